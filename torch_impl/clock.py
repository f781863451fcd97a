"""When a GPU did what: its work is only queued, so the times are those of CUDA events, and the host
may be far ahead.

Differs: only PyTorch's calls return before the GPU is done; TensorFlow's engine and Paddle's wait
after every action.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from common.schedule.action import Action


class StreamClock:
    """The clock of a pass on the calling thread's stream (`common.runtime.executor.Clock`), and
    where the GPU is in it.
    """

    def __init__(self, note: Callable[[Action], None]) -> None:
        self._note = note
        self._stream = torch.cuda.current_stream()
        self._stream.synchronize()
        self._begin_seconds, self._begin = time.perf_counter(), self.mark()
        self._queued: list[tuple[Action, torch.cuda.Event]] = []
        self._reached, self._noted = 0, -1
        self._lock = threading.Lock()

    def mark(self) -> torch.cuda.Event:
        # blocking: who waits for it sleeps, so that a GPU that hangs is not taken for a host that
        # computes.
        self._last = torch.cuda.Event(enable_timing=True, blocking=True)
        self._last.record(self._stream)
        return self._last

    def seconds(self, mark: torch.cuda.Event) -> float:
        self._last.synchronize()
        return self._begin_seconds + self._begin.elapsed_time(mark) / 1e3

    def begin(self, action: Action) -> None:
        """Note what the host is about to queue."""
        with self._lock:
            self._queued.append((action, self.mark()))
            self._noted = len(self._queued) - 1
            self._note(action)

    def note_again(self) -> None:
        """Note the action that the GPU is at, if that is not what was noted last. For any thread,
        now and then.
        """
        if not self._lock.acquire(blocking=False):
            return  # the host is noting something itself
        try:
            while (
                self._reached + 1 < len(self._queued) and self._queued[self._reached + 1][1].query()
            ):
                self._reached += 1
            if self._queued and self._noted != self._reached:
                self._noted = self._reached
                self._note(self._queued[self._reached][0])
        finally:
            self._lock.release()
