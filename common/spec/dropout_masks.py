"""Dropout masks that are the same bits in every framework, partition and schedule.

A mask element is a function of (seed, step, site, sample, position in the tensor), never of device,
stage or micro-batch. It is a counter-based generator in the sense of Salmon et al. 2011 ("Parallel
Random Numbers: As Easy as 1, 2, 3"): no state, only hashing.

    [1] step_key = mix(mix(golden ^ seed) ^ step)                   a number per optimizer step
    [2] key  = mix(step_key ^ mix(site))                            ... per step and site
    [3] row  = mix(key ^ mix(sample))                 # (B,)        ... per sample of the mini-batch
    [4] bits = mix(row[:, None] ^ mix(arange(n)))     # (B, n)      n: elements of one sample
    [5] keep = bits >= threshold(dropout)             # (B, n)

A micro-batch passes the indices that its samples have in the mini-batch, so [3] gives it the same
masks wherever the mini-batch is cut.

The mixer is Wellons' 32-bit hash with the constants 0x21f0aaad and 0x735a2d97. Both are below 2^31,
so every product fits a signed 64-bit integer, whose arithmetic all three frameworks share.

This module is the NumPy reference; each implementation repeats [2] to [5] in its own integers.
Letters in shapes: B samples of the micro-batch, n elements of one sample's tensor.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)

IntLike = TypeVar("IntLike", int, NDArray[np.int64])


def mix(x: IntLike) -> IntLike:
    """Map [0, 2^32) onto itself, so that every input bit changes about half of the output bits.

    Every line can be undone (an odd factor has an inverse modulo 2^32), so no two inputs collide.
    """
    x = x ^ (x >> 16)
    x = (x * MULTIPLIERS[0]) & MASK32
    x = x ^ (x >> 15)
    x = (x * MULTIPLIERS[1]) & MASK32
    return x ^ (x >> 15)


def step_key(seed: int, step: int) -> int:
    """Return the key of one optimizer step, in [0, 2^32). [1]

    mix(0) is 0. Without the constant (bits of the golden ratio) seed 0 would vanish from the key,
    and a step and a site could change places.
    """
    return mix(mix(0x9E3779B9 ^ (seed & MASK32)) ^ (step & MASK32))


def site_number(unit: str, place: int) -> int:
    """Return a number of its own for each dropout site: 4 x unit + place.

    Units: 0 the embedding, i + 1 block.i. Places: in the embedding 0 (its output); in a block
    0 attention weights, 1 attention output, 2 feed-forward output.
    """
    unit_number = 0 if unit == "embedding" else 1 + int(unit.removeprefix("block."))
    return 4 * unit_number + place


def threshold(dropout: float) -> int:
    """Return round(dropout * 2^32): an element whose bits are below it is dropped."""
    return round(dropout * 2**32)


def keep_mask(
    key: int, site: int, samples: NDArray[np.int64], shape: tuple[int, ...], dropout: float
) -> NDArray[Any]:
    """Return the mask, of `shape` (B, ...): True where an element is kept.

    `key` is of `step_key`, `site` of `site_number`; `samples` (B,) are indices in the mini-batch.
    """
    site_key = mix(key ^ mix(site))  # [2]
    row = mix(site_key ^ mix(samples.astype(np.int64)))  # [3] (B,)
    elements = mix(np.arange(int(np.prod(shape[1:])), dtype=np.int64))  # (n,)
    bits = mix(row[:, None] ^ elements[None, :])  # [4] (B, n)
    # [5]
    return (bits >= threshold(dropout)).reshape(shape)
