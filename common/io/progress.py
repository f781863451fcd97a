"""A bar for long work on files: on standard error, and only where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_bar(what: str, total_bytes: int, least_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield what is told how many more bytes are done; fewer than `least_bytes` show nothing."""
    if total_bytes < least_bytes or not sys.stderr.isatty():
        yield lambda more_bytes: None
        return
    # Only here: the Python of a worker process need not have it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total_bytes)
        yield lambda more_bytes: bars.advance(task, more_bytes)
