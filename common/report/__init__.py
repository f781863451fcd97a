"""Results: files, comparison, tables, pictures."""
