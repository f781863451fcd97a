"""A child's peak memory is its own, not that of the process that started it."""

from __future__ import annotations

import subprocess
import sys

MEGABYTE = 2**20
CHILD = "from common.runtime.memory import peak_resident_bytes as peak; print(peak())"
PARENT = f"""
import subprocess, sys
held = bytearray(300 * {MEGABYTE})
held[::4096] = b"x" * len(held[::4096])
{CHILD}
sys.stdout.flush()
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


def test_the_peak_is_that_of_this_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], check=True, capture_output=True, text=True
    )
    parent, child = map(int, done.stdout.split())
    assert parent > 300 * MEGABYTE
    assert MEGABYTE < child < 100 * MEGABYTE
