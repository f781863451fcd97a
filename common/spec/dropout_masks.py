"""Dropout masks that are the same bits everywhere.

A mask element is a function of (seed, step, site, sample, position in the tensor), never of device, stage or micro-batch,
so training with dropout gives one curve in all frameworks and under every partition. It is a counter-based generator
in the sense of Salmon et al. 2011 ("Parallel Random Numbers: As Easy as 1, 2, 3"): no state, only hashing. The mixer is
Wellons' 32-bit hash with the constants 0x21f0aaad and 0x735a2d97; both are below 2^31, so every product fits
a signed 64-bit integer, the one integer type whose arithmetic all three frameworks share.

    key  = mix(step_key ^ mix(site))                              a number per step and site
    row  = mix(key ^ mix(sample))                      # (B,)     a number per sample of the mini-batch
    bits = mix(row[:, None] ^ mix(arange(n)))          # (B, n)   n: elements of one sample
    keep = bits >= threshold(dropout)

This module is the NumPy reference; each implementation repeats these lines in its framework's own integers.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)

IntLike = TypeVar("IntLike", int, NDArray[np.int64])


def mix(x: IntLike) -> IntLike:
    """A bijection of [0, 2^32) that spreads every input bit over all output bits."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLIERS[0]) & MASK32
    x = x ^ (x >> 15)
    x = (x * MULTIPLIERS[1]) & MASK32
    return x ^ (x >> 15)


def step_key(seed: int, step: int) -> int:
    """The key of one optimizer step, in [0, 2^32).

    The constant (the golden ratio's bits) keeps seed 0, step 0 away from the mixer's fixed point 0, where step and site
    could change places.
    """
    return mix(mix(0x9E3779B9 ^ (seed & MASK32)) ^ (step & MASK32))


def site_number(unit: str, place: int) -> int:
    """A number for each dropout site. Units: embedding 0, block.i i + 1; places in a unit count from 0.

    Places: embedding 0: its output. Block 0: attention weights, 1: attention output, 2: feed-forward output.
    """
    unit_number = 0 if unit == "embedding" else 1 + int(unit.removeprefix("block."))
    return 4 * unit_number + place


def threshold(dropout: float) -> int:
    """Bits below it are dropped: round(dropout * 2^32)."""
    return round(dropout * 2**32)


def keep_mask(key: int, site: int, samples: NDArray[np.int64], shape: tuple[int, ...], dropout: float) -> NDArray[Any]:
    """True where the element is kept. `samples` (B,) are indices in the mini-batch; `shape` is (B, ...)."""
    site_key = mix(key ^ mix(site))
    row = mix(site_key ^ mix(samples.astype(np.int64)))  # (B,)
    elements = mix(np.arange(int(np.prod(shape[1:])), dtype=np.int64))  # (n,)
    bits = mix(row[:, None] ^ elements[None, :])  # (B, n)
    return (bits >= threshold(dropout)).reshape(shape)
