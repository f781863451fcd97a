"""The peak memory of a process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Return the peak resident size of this process.

    On Linux from `VmHWM`, which starts anew with every program. `ru_maxrss` does not: a process
    that a large parent starts reports its parent's size until it has outgrown it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_resident() -> None:
    """Make `peak_resident_bytes` start anew, where Linux lets it (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
