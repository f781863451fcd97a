"""Running a schedule: the executor that every framework shares, the child side and the parent side of a run."""
