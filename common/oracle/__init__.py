"""What is right: the model in float64 NumPy, its backward by hand, and how far a framework may be from it."""
