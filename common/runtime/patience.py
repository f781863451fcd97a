"""Tell a hanging process from a slow one, by CPU time: elapsed time says little if it is busy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import psutil

IDLE_SHARE = 0.02
"""Of one core: what waits and polls uses less, what computes more, even with twenty on it."""


class Patience:
    """Watches a process and its descendants for somebody who sees no progress.

    Patience is over when they have computed nothing for `idle_seconds`, or (an endless loop) when
    one thread has computed for `busy_seconds` since the last progress. Other work on the machine
    makes a process slow, but neither idle nor busier.
    """

    def __init__(self, pid: int, idle_seconds: float, busy_seconds: float = float("inf")) -> None:
        self._pid = pid
        self.renew(idle_seconds, busy_seconds)

    def renew(self, idle_seconds: float, busy_seconds: float = float("inf")) -> None:
        """Start counting anew after progress, from now on with these limits."""
        self.idle_seconds, self._busy_seconds = idle_seconds, busy_seconds
        self._processes: Mapping[int, float] = {}
        self._threads: Mapping[int, float] | None = None
        # A look reads much of /proc, so there is none while progress comes quickly.
        self._looked = time.monotonic()
        self._next_look = self._looked + idle_seconds / 4

    def is_over(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        processes, threads = _cpu_seconds(self._pid)
        # The first look after progress only notes where everybody stands; the next one compares.
        if self._threads is None:
            self._threads, self._next_look = threads, now + 0.75 * self.idle_seconds
            is_idle = False
        else:
            self._next_look = now + self.idle_seconds
            # Over 600 s without progress, an idle family has computed less than 12 s. One that is
            # starved by other work still gets more than that, and is waited for.
            is_idle = sum(_more(processes, self._processes)) < IDLE_SHARE * (now - self._looked)
        self._processes, self._looked = processes, now
        return is_idle or max(_more(threads, self._threads), default=0.0) >= self._busy_seconds


def _cpu_seconds(pid: int) -> tuple[dict[int, float], dict[int, float]]:
    """What a process and its descendants have computed, dead ones too: by process and by thread."""
    processes: dict[int, float] = {}
    threads: dict[int, float] = {}
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                processes[process.pid] = float(sum(process.cpu_times()[:4]))
                threads |= {
                    thread.id: thread.user_time + thread.system_time for thread in process.threads()
                }
    return processes, threads


def _more(now: Mapping[int, float], before: Mapping[int, float]) -> list[float]:
    return [max(0.0, seconds - before.get(key, 0.0)) for key, seconds in now.items()]
