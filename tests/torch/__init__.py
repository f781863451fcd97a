"""What PyTorch's implementation promises, with PyTorch in the test's own process: `pytest
tests/torch`.
"""
