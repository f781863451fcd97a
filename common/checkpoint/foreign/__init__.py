"""Weights in other projects' files: what all `convert` modules share, and GPT-2's names."""
