"""What is right: the model in float64 NumPy, its backward by hand, and the tolerances."""
