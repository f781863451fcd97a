"""Linear layers whose backward leaves the product for the weight in fleet's `WeightGradStore`,
while that is enabled.

Differs: fleet has one (`SplitBWLinear`), for inputs of the weight's precision alone; PyTorch taps
its layers, TensorFlow cuts its graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import (
    SplitBWLinear,
    SplitBWMatmul,
    WeightGradStore,
    grad_weight_fn,
)
from paddle.nn import functional

from paddle_impl.rounding import at_least_float32, in_dtype


class Linear(SplitBWLinear):
    """Fleet's layer, for inputs of a lower precision than the weight's too."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight + bias` (..., O), in the precision of `x`."""
    split = SplitBWMatmul if x.dtype == weight.dtype else _RoundedMatmul
    return split.apply(x, weight, bias)


class _RoundedMatmul(PyLayer):
    """Fleet's `SplitBWMatmul` with a weight that is rounded to the input's precision each time:
    what is held is the weight itself. The gradients are added to in the weight's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        added = None if bias is None else in_dtype(bias, x.dtype)
        return functional.linear(x, in_dtype(weight, x.dtype), added)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensor()
        add = partial(grad_weight_fn, x, weight, gradient)
        if WeightGradStore.enabled:
            WeightGradStore.put(add)
        else:
            add()
        rounded = in_dtype(weight, gradient.dtype)
        of_x = None if x.stop_gradient else paddle.matmul(gradient, rounded, transpose_y=True)
        if bias is None:
            return of_x, None
        return of_x, None, at_least_float32(gradient).flatten(0, -2).sum(0)


def merge_backward(layer: nn.Layer) -> None:
    """Make the linear layers in `layer` ordinary ones, whose backward is one operation."""
    for part in layer.sublayers():
        if isinstance(part, Linear):
            part.__class__ = nn.Linear  # its subclass adds a forward, and no state


class _TiedProjection(PyLayer):
    """`x @ weight.T` for a weight (V, D): fleet's SplitBWLinear has only weights (D, V)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return paddle.matmul(x, in_dtype(weight, x.dtype), transpose_y=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensor()
        # The weight's gradient never goes through autograd, which would make it at once: it gets
        # None, and the product is added here (BW) or by whoever takes it from the store (W).
        add = partial(_add_tied_gradient, x, weight, gradient)
        if WeightGradStore.enabled:
            WeightGradStore.put(add)
        else:
            add()
        return paddle.matmul(gradient, in_dtype(weight, gradient.dtype)), None


@paddle.no_grad()
def _add_tied_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    # Samples and positions are the rows of one matrix: (N, V)ᵀ (N, D), with N = B S.
    product = paddle.matmul(gradient.flatten(0, -2), x.flatten(0, -2), transpose_x=True)  # (V, D)
    product = in_dtype(product, weight.dtype)
    weight.grad = product if weight.grad is None else weight.grad.add_(product)


def tied_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, S, V) of `x` (B, S, D) with the token embedding (V, D)."""
    return _TiedProjection.apply(x, weight)
