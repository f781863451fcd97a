"""The verbs of the console script, one module per group; each has `register(subparsers)`."""
