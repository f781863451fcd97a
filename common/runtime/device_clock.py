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

    mark: Callable[[], Any]

    def __init__(self, note: Callable[[Action], None]) -> None:
        self._note, self._begun = note, None
        self._queued: list[tuple[Action, Any]] = []
        self._reached, self._noted = 0, -1
        self._lock = threading.Lock()

    def begin(self, action: Action) -> None:
        """Note what the host is about to queue."""
        with self._lock:
            self._begun = None
            mark = self.mark()
            self._queued.append((action, mark))
            self._begun = mark
            self._noted = len(self._queued) - 1
            self._note(action)

    def begun(self) -> Any:
        """Return the mark of `begin` to the first `mark` behind it: nothing lies between the two,
        and an event takes the host as long as a small kernel.
        """
        mark, self._begun = self._begun, None
        return mark

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
