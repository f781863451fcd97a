"""The TensorFlow implementation: each stage's graph cut into F, B and W, driven by one thread per
device.
"""
