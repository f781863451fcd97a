"""Messages between the threads of one process: the part of a `Channel` that knows no framework."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from common.runtime.decode import Extension
from common.runtime.executor import Message


class PipelineStopped(RuntimeError):
    """Another stage has failed, so what this one waits for will never come."""


class Mailbox:
    """Hands objects from thread to thread; made anew for every pass. Puts never wait."""

    def __init__(self) -> None:
        self._mail: dict[Hashable, Any] = {}
        self._changed = threading.Condition()
        self.failure: BaseException | None = None
        """Why the pass was stopped: the first error of any stage."""

    def put(self, message: Hashable, content: Any) -> None:
        """Leave `content` for whoever takes `message`."""
        with self._changed:
            self._mail[message] = content
            self._changed.notify_all()

    def take(self, message: Hashable) -> Any:
        """Wait for a message's content. Raises PipelineStopped if a stage fails before."""
        with self._changed:
            # Woken by every message and by a failure; without the latter a stage whose sender has
            # died would wait for ever.
            self._changed.wait_for(lambda: message in self._mail or self.failure)
            self.check()
            return self._mail.pop(message)

    def tell(self, message: Message, extension: Extension | None, device: int) -> None:
        """As `common.runtime.decode.Channel`."""
        self.put(replace(message, kind="word"), extension)

    def hear(self, message: Message, device: int) -> Extension | None:
        """As above. Raises PipelineStopped if a stage fails before it is there."""
        extension: Extension | None = self.take(replace(message, kind="word"))
        return extension

    def check(self) -> None:
        """Raise PipelineStopped once a stage has failed."""
        if self.failure is not None:
            raise PipelineStopped("another stage failed")

    def stop(self, failure: BaseException) -> None:
        """End the pass for all stages; the first failure is kept."""
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()
