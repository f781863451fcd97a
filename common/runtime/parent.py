"""A worker that does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "TRIPTYCH_PARENT"
"""The environment variable that tells workers their parent's process id."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """This process gets signal `number` when its parent ends, even by SIGKILL (prctl(2) of Linux).

    A parent that has ended before this call is known by PARENT, if set: then this process exits.
    """
    # What the user's shell ignores or blocks, a parent's end must still do.
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))
        if os.environ.pop(PARENT, None) not in (None, str(os.getppid())):
            sys.exit(128 + int(number))
