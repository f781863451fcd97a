"""When: schedules as data, made, checked, simulated, searched and drawn. Imports io alone."""
