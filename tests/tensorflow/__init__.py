"""What TensorFlow's implementation promises, with TensorFlow in the test's own process: `pytest
tests/tensorflow`.
"""
