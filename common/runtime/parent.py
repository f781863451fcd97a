"""A child that does not outlive its parent."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """This process gets signal `number` when its parent ends, even by SIGKILL (Linux: prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))
