"""Waiting for other processes as long as it takes: what never comes is found by `tests/watchdog.py`, not by a clock."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    """Raises AssertionError where the process ends before it has happened."""
    while not happened():
        assert process.poll() is None or happened(), f"ended with {process.returncode} before it happened"
        time.sleep(0.1)


def wait_for_end(processes: Iterable[psutil.Process]) -> None:
    """Zombies are dead, whoever has yet to collect them."""
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
