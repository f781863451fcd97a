"""What a running benchmark shows: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.io.console import say

PLAIN_SECONDS = 10.0
"""Seconds between two lines of one run if there is no terminal."""


class PlainProgress:
    """One line as a run starts, one every few seconds while it trains, one as it ends."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs = console, runs
        self.started, self.name, self.steps, self.shown = 0, "", 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, name: str, steps: int) -> None:
        """Note that the next run begins."""
        self.started, self.name, self.steps = self.started + 1, name, steps
        self.shown = time.monotonic()
        self._line(f"[{self.started}/{self.runs}] {name}: {steps} steps")

    def step(self, step: int, loss: float) -> None:
        """Note that the run has done a step, counted from 0."""
        if time.monotonic() - self.shown >= PLAIN_SECONDS:
            self.shown = time.monotonic()
            self._line(f"      {self.name}: step {step + 1} of {self.steps}, loss {loss:.4f}")

    def finish(self, summary: str) -> None:
        """Note how the run ended."""
        self._line(f"      {summary}")

    def _line(self, text: str) -> None:
        say(self.console, text)


class LiveProgress(PlainProgress):
    """Two bars: the runs, and the steps of the present one with its loss."""

    def __init__(self, console: Console, runs: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.all = self.bars.add_task("runs", total=runs, note="")
        self.one = self.bars.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def start(self, name: str, steps: int) -> None:
        self.bars.reset(self.one, description=name, total=steps, note="starting", visible=True)

    def step(self, step: int, loss: float) -> None:
        self.bars.update(self.one, completed=step + 1, note=f"step {step + 1}, loss {loss:.4f}")

    def finish(self, summary: str) -> None:
        self.bars.console.print(summary, highlight=False, markup=False)
        self.bars.advance(self.all)


def progress_view(console: Console, runs: int) -> PlainProgress:
    """Return the live bar for a terminal, else plain lines."""
    return LiveProgress(console, runs) if console.is_terminal else PlainProgress(console, runs)
