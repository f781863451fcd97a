"""Dropout: `common.spec.dropout_masks` in Paddle's integers, bit for bit, or Paddle's own.

Both are drawn on the stage's own device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.nn import functional

from common.spec.dropout_masks import MULTIPLIERS, mix, threshold
from paddle_impl.rounding import at_least_float32, in_dtype

_SIGN = 2**31
"""The sign bit of a 32-bit integer."""


@dataclass(slots=True)
class DropoutContext:
    """What the masks of one micro-batch depend on, besides their site.

    Differs: one object that all units of a stage share and that is changed before each forward,
    since fleet calls a layer with its input only.
    """

    native: bool = False
    """Whether the masks are Paddle's own."""
    step_key: int | None = None
    """None: no dropout (evaluation)."""
    # (b,), indices in the mini-batch
    samples: NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    elements: dict[int, Tensor] = field(default_factory=dict)
    """The part of the masks that only the position decides, kept by the number of elements."""

    def _first_elements(self, count: int) -> Tensor:
        """The hashes of `count` elements, after the mixer's first shift: (count,) int32."""
        if count not in self.elements:
            hashes = _multiply_and_shift_(_shift_(paddle.arange(count, dtype="int32"), 16))
            self.elements[count] = _shift_(hashes, 16)
        return self.elements[count]


def _shift_(x: Tensor, places: int) -> Tensor:
    """`x ^ (x >> places)` of 32-bit numbers without sign, in place."""
    return x.bitwise_xor_(
        paddle.bitwise_right_shift(x, paddle.full_like(x, places), is_arithmetic=False)
    )


def _multiply_and_shift_(x: Tensor) -> Tensor:
    """`common.spec.dropout_masks.mix` after its first shift, in place; int32 wraps at 2^32."""
    for multiplier in MULTIPLIERS:
        _shift_(x.multiply_(paddle.full_like(x, multiplier)), 15)
    return x


@paddle.no_grad()
def keep_mask(
    context: DropoutContext,
    site: int,
    shape: Sequence[int],
    probability: float,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...).

    `part` is (which, of how many) of a larger tensor that is cut along its second axis, whose mask
    this is a part of: a shard's heads get the masks that they have where all heads are together.

    Shifts and `^` change places, so the mixer's first shift is done on rows and elements, once.
    Sample by sample and with full tensors for constants: Paddle's broadcasting takes several times
    as long as the arithmetic.
    """
    assert context.step_key is not None
    n, (which, count) = math.prod(shape[1:]), part
    elements = context._first_elements(count * n)[which * n : (which + 1) * n]  # (n,)
    rows = mix(mix(context.step_key ^ mix(site)) ^ mix(context.samples))  # (b,)
    least = paddle.full_like(elements, threshold(probability) - _SIGN)
    keep = []
    for row in _signed(rows ^ (rows >> 16)):
        bits = _multiply_and_shift_(paddle.full_like(elements, row).bitwise_xor_(elements))  # (n,)
        # a comparison without sign
        keep.append(bits.bitwise_xor_(paddle.full_like(bits, -_SIGN)) >= least)
    return paddle.stack(keep).reshape(shape)


def dropout(
    x: Tensor,
    probability: float,
    site: int,
    context: DropoutContext,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a key or with probability 0."""
    if context.step_key is None or probability == 0:
        return x
    if context.native:
        return native_dropout(x, probability, site, context, part)
    return _Masked.apply(x, keep_mask(context, site, x.shape, probability, part), probability)


class _Masked(PyLayer):
    """`x` where kept, scaled up; holds a mask of bools, where `x * mask` holds `x` and floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.probability = probability
        return _scaled(x, keep, probability)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensor()
        return _scaled(gradient, keep, ctx.probability), None


def _scaled(x: Tensor, keep: Tensor, probability: float) -> Tensor:
    # The factor is not rounded to bfloat16, where 1 / 0.9 would be 1.109.
    wide = at_least_float32(x)
    return in_dtype(wide * (keep.astype(wide.dtype) / (1 - probability)), x.dtype)


def native_dropout(
    x: Tensor,
    probability: float,
    site: int,
    context: DropoutContext,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Paddle's own masks, seeded by what shared masks depend on, so a rerun drops the same."""
    assert context.step_key is not None
    paddle.seed(mix(mix(context.step_key ^ mix(site)) ^ int(context.samples[0])))
    which, count = part
    if count == 1:
        return functional.dropout(x, probability)
    whole = paddle.ones([x.shape[0], x.shape[1] * count, *x.shape[2:]], x.dtype)
    return x * functional.dropout(whole, probability).chunk(count, 1)[which]


def _signed(x: NDArray[Any]) -> list[int]:
    """Numbers in [0, 2^32) as the same 32 bits with a sign."""
    return [int(value) for value in x.astype(np.uint32).view(np.int32)]
