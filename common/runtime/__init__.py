"""One process of a run: the shared executor, the engine's contract, the worker and its files."""
