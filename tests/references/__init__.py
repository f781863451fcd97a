"""Checks that need a framework: each runs in a process of its own and prints JSON."""
