"""The one console. It prints text, not markup: `[red]`, `:smile:` and numbers stay as they are."""

from __future__ import annotations

import os

from rich.console import Console

from common.io.edges import whole_number

PLAIN_WIDTH = 200
"""Columns if the output is not a terminal, so that tables are not folded."""
MIN_WIDTH = 20
"""A terminal that reports fewer columns, or none, is assumed to have this many."""


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_console() -> Console:
    """Return a console for the terminal, or one with lines too wide to be folded."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")
    }
    made = Console(markup=False, emoji=False, highlight=False, _environ=environment)
    asked = whole_number(os.environ.get("COLUMNS", ""))
    if asked is None and not made.is_terminal:
        made.width = PLAIN_WIDTH
    else:
        made.width = max(MIN_WIDTH, asked or made.width)
    return made
