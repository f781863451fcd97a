"""`common.dropout` in Paddle's 64-bit integers: the same lines, the same bits, on the stage's own device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from common.dropout import MASK32, MULTIPLIERS, mix, threshold


@dataclass(slots=True)
class DropoutContext:
    """What the masks of one micro-batch depend on, besides their site.

    Differs: one object that all units of a stage share and that is changed before each forward, since fleet calls a
    layer with its input only.
    """

    step_key: int | None = None
    """None: no dropout (evaluation)."""
    samples: Tensor | None = None  # (b,) int64, indices in the mini-batch


def mix_(x: Tensor) -> Tensor:
    """`common.dropout.mix` of int64 values in [0, 2^32), in place."""
    mask = _integer(MASK32)
    x.bitwise_xor_(x >> 16)
    x.multiply_(_integer(MULTIPLIERS[0])).bitwise_and_(mask)
    x.bitwise_xor_(x >> 15)
    x.multiply_(_integer(MULTIPLIERS[1])).bitwise_and_(mask)
    x.bitwise_xor_(x >> 15)
    return x


@paddle.no_grad()
def keep_mask(step_key: int, samples: Tensor, site: int, shape: Sequence[int], probability: float) -> Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...)."""
    row = mix_(mix_(samples.clone()) ^ _integer(mix(step_key ^ mix(site))))  # (b,)
    elements = mix_(paddle.arange(math.prod(shape[1:]), dtype="int64"))  # (n,)
    bits = mix_(row.unsqueeze(1) ^ elements)  # (b, n)
    return (bits >= _integer(threshold(probability))).reshape(shape)


def dropout(x: Tensor, probability: float, site: int, context: DropoutContext) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a key or with probability 0."""
    if context.step_key is None or probability == 0:
        return x
    keep = keep_mask(context.step_key, context.samples, site, x.shape, probability)
    return x * (keep.astype(x.dtype) / (1 - probability))


def _integer(value: int) -> Tensor:
    """Paddle's bitwise operators take tensors only, and `to_tensor` of a number above 2^31 is int64 anyway."""
    return paddle.full([], value, "int64")
