"""`common.dropout` in PyTorch's 64-bit integers: the same lines, the same bits, on the stage's own device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.dropout import MASK32, MULTIPLIERS, mix, threshold


class DropoutContext(NamedTuple):
    """What the masks of one micro-batch depend on, besides their site."""

    step_key: int
    samples: Tensor  # (b,) int64, indices in the mini-batch


def mix_(x: Tensor) -> Tensor:
    """`common.dropout.mix` of int64 values in [0, 2^32), in place."""
    x ^= x >> 16
    x *= MULTIPLIERS[0]
    x &= MASK32
    x ^= x >> 15
    x *= MULTIPLIERS[1]
    x &= MASK32
    x ^= x >> 15
    return x


def keep_mask(context: DropoutContext, site: int, shape: torch.Size, probability: float) -> Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...)."""
    samples = context.samples
    row = mix_(mix_(samples.clone()) ^ mix(context.step_key ^ mix(site)))  # (b,)
    elements = mix_(torch.arange(math.prod(shape[1:]), device=samples.device))  # (n,)
    bits = mix_(row[:, None] ^ elements)  # (b, n)
    return (bits >= threshold(probability)).view(shape)


def dropout(x: Tensor, probability: float, site: int, context: DropoutContext | None) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a context or with probability 0."""
    if context is None or probability == 0:
        return x
    return x * (keep_mask(context, site, x.shape, probability).to(x.dtype) / (1 - probability))
