"""Signals that a process heeds for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def heeding(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` be called for these signals, but for those a nohup or trap ignores."""
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
