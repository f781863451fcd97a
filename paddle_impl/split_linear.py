"""Linear layers whose backward leaves the product for the weight in fleet's `WeightGradStore`,
while that is enabled.

Differs: fleet has one (`SplitBWLinear`); PyTorch taps its layers, TensorFlow cuts its graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import SplitBWLinear as Linear
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import WeightGradStore

__all__ = ["Linear", "merge_backward", "tied_projection"]


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
        return paddle.matmul(x, weight, transpose_y=True)

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
        return paddle.matmul(gradient, weight), None


@paddle.no_grad()
def _add_tied_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    # Samples and positions are the rows of one matrix: (N, V)ᵀ (N, D), with N = B S.
    product = paddle.matmul(gradient.flatten(0, -2), x.flatten(0, -2), transpose_x=True)  # (V, D)
    weight.grad = product if weight.grad is None else weight.grad.add_(product)


def tied_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, S, V) of `x` (B, S, D) with the token embedding (V, D)."""
    return _TiedProjection.apply(x, weight)
