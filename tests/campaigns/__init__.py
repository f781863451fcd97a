"""Measurements that take minutes and are no tests: README.md."""
