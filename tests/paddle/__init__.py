"""What Paddle's implementation promises, with Paddle in the test's own process: `pytest
tests/paddle`.
"""
