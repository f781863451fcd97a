"""Dropout: `common.spec.dropout_masks` in PyTorch's integers, bit for bit, or PyTorch's own.

Both are drawn on the stage's own device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.spec.dropout_masks import MASK32, MULTIPLIERS, mix, threshold

_SIGN = -(2**31)
"""The sign bit of a 32-bit integer."""


class ElementHashes:
    """The masks' part by position alone, by element count; one per stage, in its stream."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def first(self, count: int, device: torch.device) -> Tensor:
        """Return those of `count` elements, after the mixer's first shift: (count,) int32."""
        if count not in self._kept:
            self._kept[count] = _first_shift(_mix_(torch.arange(count, device=device)))
        return self._kept[count]


class DropoutContext(NamedTuple):
    """What the masks of one micro-batch depend on, besides their site."""

    step_key: int
    samples: Tensor  # (b,) int64, indices in the mini-batch
    first_sample: int
    elements: ElementHashes
    generator: torch.Generator | None = None
    """Where the masks are PyTorch's own."""


def _mix_(x: Tensor) -> Tensor:
    """`common.spec.dropout_masks.mix` of int64 values in [0, 2^32), in place."""
    x ^= x >> 16
    x *= MULTIPLIERS[0]
    x &= MASK32
    x ^= x >> 15
    x *= MULTIPLIERS[1]
    x &= MASK32
    x ^= x >> 15
    return x


def _first_shift(x: Tensor) -> Tensor:
    """`x ^ (x >> 16)` as the same 32 bits in an int32."""
    return (x ^ (x >> 16)).to(torch.int32)


def keep_mask(
    context: DropoutContext,
    site: int,
    shape: torch.Size,
    probability: float,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...).

    `part` is (which, of how many) of a larger tensor that is cut along its second axis, whose mask
    this is a part of: a shard's heads get the masks that they have where all heads are together.

    Shifts and `^` change places, so the mixer's first shift is done on rows and elements. The rest
    is in int32, half the memory: products wrap at 2^32, a shift's copies of the sign are cut off,
    and the comparison is of unsigned numbers.
    """
    samples = context.samples
    row = _mix_(_mix_(samples.clone()) ^ mix(context.step_key ^ mix(site)))  # (b,)
    n, (which, count) = math.prod(shape[1:]), part
    elements = context.elements.first(count * n, samples.device)[which * n : (which + 1) * n]
    bits = _first_shift(row)[:, None] ^ elements  # (b, n)
    for multiplier in MULTIPLIERS:
        bits *= multiplier
        bits ^= (bits >> 15).bitwise_and_(MASK32 >> 15)
    bits ^= _SIGN
    return (bits >= threshold(probability) + _SIGN).view(shape)


def dropout(
    x: Tensor,
    probability: float,
    site: int,
    context: DropoutContext | None,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a context or at 0."""
    if context is None or probability == 0:
        return x
    if context.generator is not None:
        return native_dropout(x, probability, site, context, part)
    return _masked(x, keep_mask(context, site, x.shape, probability, part), probability)


def native_dropout(
    x: Tensor,
    probability: float,
    site: int,
    context: DropoutContext,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Return the same with PyTorch's own draw.

    Differs: not `functional.dropout`, which takes no generator and uses one that all threads share;
    this is what it does on a CPU. Seeded anew for every mask, so that a recomputation draws the
    same one and no schedule changes it.
    """
    seed = mix(mix(context.step_key ^ mix(site)) ^ mix(context.first_sample))
    assert context.generator is not None  # as in `dropout`, which chooses
    generator = context.generator.manual_seed(seed)
    which, count = part
    whole = (x.shape[0], x.shape[1] * count, *x.shape[2:])
    kept = torch.empty(whole, device=context.samples.device).bernoulli_(
        1 - probability, generator=generator
    )
    return _masked(x, kept.chunk(count, 1)[which], probability)


def _masked(x: Tensor, mask: Tensor, probability: float) -> Tensor:
    kept = x * mask.to(x.dtype)
    return kept.div_(1 - probability)  # not the mask, where bfloat16 would make 1.109 of 1 / 0.9
