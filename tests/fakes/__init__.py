"""A stand-in for an implementation, for tests of the harness."""
