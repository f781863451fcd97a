"""Keep memory that was freed, instead of giving it to the system and asking for it again.

A step frees what it held, and the next one wants the same again. glibc returns a thread's memory as
soon as 64 MiB of it are free at its end, and the system zeroes every page anew when it is touched.
Preset `small`, two stages, page faults and system time of a step, before and after (PyTorch):

    gpipe, m = 4    12,700   34 ms      290   0 ms
    1f1b, m = 8     21,400   52 ms       90   11 ms
    zb-h1, m = 8     9,700   19 ms      120   0 ms

Whoever is the first to touch a page pays for it, so an action's time would depend on the schedule.
What a step gains is at the limit of what can be measured: two turns each without and with it, in
ms, gave 437, 400 and 405, 385 (gpipe), 414, 398 and 389, 396 (1f1b).

Each thread keeps a heap of its own. One heap for all (M_ARENA_MAX = 1) has as few page faults, but
every job of a process leaves it more broken up, and TensorFlow's operations allocate all the time:
on one stage, six jobs of a process took 714 ms a step with one heap and 646 with several (medians
of two processes each, in turns).
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""mallopt(3)."""
NEVER = 2**31 - 1
"""More free memory than this at the heap's end goes back to the system: mallopt takes an int."""
HEAP_BYTES = 64 * 2**20
"""Of the pieces that a thread's heap is made of."""


def keep_freed_memory() -> None:
    """Tell glibc, for this process and those forked from it; nothing where another allocator is at
    work or the user has tuned this one.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or tuned or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        # Else blocks of more than 32 MiB never come from a heap. Those too large for a thread's
        # heap come from the first thread's, which has no pieces.
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
        # A thread's last piece, once free, goes back if the one below has more than this at its
        # end, which it cannot have.
        mallopt(M_TOP_PAD, HEAP_BYTES)
