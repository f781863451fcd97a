"""How import and export report: errors, and notes about what they have changed."""

from __future__ import annotations

from common.io.usage import UsageError

NOTE = "note: "


class ExchangeError(UsageError):
    """A file that is not as it should be; its text is one line."""


def note(text: str) -> None:
    """Print what was done to the file's content; the parent passes these lines on."""
    print(f"{NOTE}{' '.join(text.split())}", flush=True)
