"""Take numbers that are almost 0 for 0, as TensorFlow does in its own threads.

Float32 has its full precision down to 1e-38; below, down to 1e-45, numbers are denormal, and a
processor that computes with one takes a hundred times as long. Paddle's softmax makes many:

    score   what is masked is at -1e30; the kernel clips it 64 below the largest
    F       its weight is exp(-64) = 1.6e-28
    B       1.6e-28 x a gradient of 1e-11 = 1.6e-39, which goes into two products

How many depends on the weights. On preset `small`, B took 170 ms of a step at first, 334 ms in step
13, and 170 ms again from step 20 on. What a denormal adds to a weight is lost in rounding anyway.

Differs: in PyTorch what is masked has a weight of 0, and TensorFlow needs no telling.
"""

from __future__ import annotations

import ctypes
import platform
import sys

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 0x8000, 0x0040
"""Bits of MXCSR, the register that says how SSE and AVX compute: results, and what goes in."""
MXCSR = 7
"""Which of the eight words of glibc's `fenv_t` it is on x86-64."""


def flush_denormals() -> None:
    """Set both bits for the calling thread, whose threads and processes inherit them; nothing where
    neither glibc nor an x86-64 is at work.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or not platform.libc_ver()[0]:
        return
    libm, environment = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    environment[MXCSR] |= FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
    libm.fesetenv(environment)
