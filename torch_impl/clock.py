"""When a GPU did what: its work is queued and the host may be far ahead, so CUDA events tell.

Differs: TensorFlow's engine waits after every action.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from common.runtime.device_clock import DeviceClock
from common.schedule.action import Action


class StreamClock(DeviceClock):
    """The clock of a pass on the calling thread's streams, and where its GPU is."""

    _last: torch.cuda.Event

    def __init__(self, note: Callable[[Action], None]) -> None:
        super().__init__(note)
        torch.cuda.current_stream().synchronize()
        self._begin_seconds, self._begin = time.perf_counter(), self.mark()

    def mark(self) -> torch.cuda.Event:
        # blocking: who waits for it sleeps, so a GPU that hangs does not look like a busy host.
        self._last = torch.cuda.Event(enable_timing=True, blocking=True)
        self._last.record(torch.cuda.current_stream())
        return self._last

    def seconds(self, mark: torch.cuda.Event) -> float:
        self._last.synchronize()
        milliseconds: float = self._begin.elapsed_time(mark)
        return self._begin_seconds + milliseconds / 1e3
