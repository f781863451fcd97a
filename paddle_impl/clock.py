"""When a GPU did what: its work is only queued, so the times are those of events on its stream, and
the host may be far ahead.

Differs: TensorFlow's engine waits after every action.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import paddle
from paddle.device import Event

from common.runtime.device_clock import DeviceClock
from common.runtime.executor import Clock, HostClock
from common.schedule.action import Action

_POLL_SECONDS = 0.5
"""How often a GPU is asked where it is, for `Engine.on_action`."""


class StreamClock(DeviceClock):
    """The clock of a pass on the stream of this process, and where its GPU is."""

    def __init__(self, note: Callable[[Action], None]) -> None:
        super().__init__(note)
        paddle.device.synchronize()
        self._begin_seconds, self._begin = time.perf_counter(), self.mark()

    def mark(self) -> Event:
        self._last = Event(enable_timing=True)
        self._last.record()
        return self._last

    def seconds(self, mark: Event) -> float:
        # Differs: it is asked again and again, since Paddle's `synchronize` keeps Python's lock and
        # would stop the thread of `followed`. The pauses grow: a hang must not look like computing.
        pause_seconds = 1e-4
        while not self._last.query():
            time.sleep(pause_seconds)
            pause_seconds = min(1.02 * pause_seconds, 0.1)
        milliseconds: float = self._begin.elapsed_time(mark)
        return self._begin_seconds + milliseconds / 1e3


def device_clock(note: Callable[[Action], None]) -> Clock:
    """Return a pass' clock; a plugin's events tell no time in Paddle 3.3: there the host's."""
    tells = paddle.device.get_device() != "cpu" and hasattr(Event().event_base, "elapsed_time")
    return StreamClock(note) if tells else HostClock()


@contextmanager
def followed(clock: Clock, note: Callable[[Action], None]) -> Iterator[Callable[[Action], None]]:
    """Give what the host calls ahead of each action. Where a GPU does it later, a thread notes
    meanwhile where that is.

    Differs: PyTorch's engine has a thread to spare, the one that started those of the stages.
    """
    if not isinstance(clock, DeviceClock):
        yield note
        return
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL_SECONDS):
            clock.note_again()

    follower = threading.Thread(target=follow, name="clock", daemon=True)
    follower.start()
    try:
        yield clock.begin
    finally:
        over.set()
        follower.join()
