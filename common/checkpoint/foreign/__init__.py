"""Weights in other projects' files: what all `convert` modules share; GPT-2 and Llama."""
