"""Where a device is whose work is only queued, while the host may be far ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from common.schedule.action import Action


class DeviceClock:
    """The half of a `common.runtime.executor.Clock` that no framework is needed for.

    A framework adds `mark`, whose events tell whether they are done (`query`), and `seconds`.
    """

    _last: Any
    """The latest mark."""

    def __init__(self, note: Callable[[Action], None]) -> None:
        self._note = note
        self._queued: list[tuple[Action, Any]] = []
        self._reached, self._noted = 0, -1
        self._lock = threading.Lock()

    def begin(self, action: Action) -> None:
        """Note what the host is about to queue."""
        with self._lock:
            # The device is there when it has passed the end of the action before. Another event
            # here would take the host as long as a small kernel.
            self._queued.append((action, self._last))
            self._noted = len(self._queued) - 1
            self._note(action)

    def note_again(self) -> None:
        """Note the action that the device is at, unless it was noted last. For any thread."""
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
