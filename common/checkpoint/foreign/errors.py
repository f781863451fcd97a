"""What import and export say: errors, and notes about what they have changed."""

from __future__ import annotations

NOTE = "note: "


class ExchangeError(ValueError):
    """A file that is not what it should be; its text is one line."""


def note(text: str) -> None:
    """Says on standard output what was done to the file's content; the parent passes these lines on."""
    print(f"{NOTE}{' '.join(text.split())}", flush=True)
