"""Text in and out: files, streams, consoles, pictures, errors. Imports no other room."""
