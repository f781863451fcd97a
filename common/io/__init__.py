"""Text that comes in and goes out: files, streams, consoles, pictures, errors. Imports nothing of the rest."""
