"""The one console. What it prints is text, not markup: `[red]`, `:smile:` and numbers stay as they are."""

from __future__ import annotations

import os

from rich.console import Console

from common.io.edges import whole_number

PLAIN_WIDTH = 200
"""Columns where the output is no terminal, so that tables are not folded."""
MIN_WIDTH = 20
"""A terminal that says it has fewer, or none, is not believed."""


def make_console() -> Console:
    """The terminal, or lines wide enough not to be folded."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    made = Console(markup=False, emoji=False, highlight=False, _environ=environment)
    asked = whole_number(os.environ.get("COLUMNS", ""))
    if asked is None and not made.is_terminal:
        made.width = PLAIN_WIDTH
    else:
        made.width = max(MIN_WIDTH, asked or made.width)
    return made
