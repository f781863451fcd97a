"""The TensorFlow implementation: each stage's graph cut into F, B and W, one thread per device."""
