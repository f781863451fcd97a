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
        self._lock = threading.Lock()
        self._awaited: dict[Hashable, threading.Condition] = {}
        self.failure: BaseException | None = None
        """Why the pass was stopped: the first error of any stage."""

    def put(self, message: Hashable, content: Any) -> None:
        """Leave `content` for whoever takes `message`."""
        with self._lock:
            self._mail[message] = content
            # Nobody else: each thread that wakes for nothing takes Python's lock from one that
            # works. Four stages whose actions are short are slower than one with that.
            if message in self._awaited:
                self._awaited[message].notify()

    def take(self, message: Hashable) -> Any:
        """Wait for a message's content. Raises PipelineStopped if a stage fails before."""
        with self._lock:
            if message not in self._mail:
                # Woken by a failure too: else a stage whose sender has died would wait for ever.
                self._awaited[message] = threading.Condition(self._lock)
                self._awaited[message].wait_for(lambda: message in self._mail or self.failure)
                del self._awaited[message]
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
        with self._lock:
            self.failure = self.failure or failure
            for arrival in self._awaited.values():
                arrival.notify()
