"""What the three implementations share; imports no framework."""
