"""Weights in other people's files: what an implementation's `convert` shares, and GPT-2's names."""
