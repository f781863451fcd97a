"""Waiting for other processes as long as it takes: what never comes is found by
`tests/watchdog.py`, not by a clock.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from common.harness import launch

LONG_SECONDS = 100_000
"""A timeout that strikes in `time_jumps` alone."""


def time_jumps(monkeypatch: pytest.MonkeyPatch, happened: Callable[[], Any]) -> None:
    """For the parent of a worker `LONG_SECONDS` are over at once when it has happened, and never
    before.
    """
    so_far: list[bool] = []

    def monotonic() -> float:
        if not so_far and happened():
            so_far.append(True)
        return time.monotonic() + 10 * LONG_SECONDS * len(so_far)

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))


def marked(mark: str) -> list[int]:
    """Living processes with this word in their command line: those that a fake has started."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if mark in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    """Raises AssertionError where the process ends before it has happened."""
    while not happened():
        assert process.poll() is None or happened(), (
            f"ended with {process.returncode} before it happened"
        )
        time.sleep(0.2)


def wait_for_end(processes: Collection[psutil.Process]) -> None:
    """Zombies are dead, whoever has yet to collect them."""
    try:
        while any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            for process in processes
        ):
            time.sleep(0.2)
    finally:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
