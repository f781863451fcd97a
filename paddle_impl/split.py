"""The backward in two halves, by fleet's own means: `WeightGradStore`, the store of its zero-bubble
pipelines.

While the store is enabled, a linear layer's backward gives the gradients of its input and bias at
once and leaves the product for its weight in the store. B runs with the store enabled and takes
what is left; W runs the products later. Embeddings, norms and biases get their gradients in B: they
are cheap, and B runs in micro-batch order as W does. Source: Zero Bubble Pipeline Parallelism (Qi
et al. 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import SplitBWLinear as Linear
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import WeightGradStore

__all__ = ["Linear", "defer_weight_gradients", "merge_backward", "tensors_of", "tied_projection"]

Product = partial[None]


def defer_weight_gradients(backward: Callable[[], None]) -> list[Product]:
    """Run `backward` without the products for the linear layers' weights and return these."""
    WeightGradStore.enabled = True
    try:
        backward()
        return WeightGradStore.cache
    finally:
        WeightGradStore.enabled, WeightGradStore.cache = False, []


def tensors_of(product: Product) -> list[Tensor]:
    """Return what a product that waits for W holds: the layer's input, its weight, its output's
    gradient.
    """
    return list(product.args)


def merge_backward(layer: nn.Layer) -> None:
    """Make the linear layers in `layer` ordinary ones, whose backward is one operation."""
    for part in layer.sublayers():
        if isinstance(part, Linear):
            part.__class__ = nn.Linear


class _TiedProjection(PyLayer):
    """`x @ weight.T` for a weight (V, D): fleet's SplitBWLinear has only weights (D, V)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return paddle.matmul(x, weight, transpose_y=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensor()

        if WeightGradStore.enabled:
            WeightGradStore.put(partial(_add_tied_gradient, x, weight, gradient))
        else:
            _add_tied_gradient(x, weight, gradient)
        return paddle.matmul(gradient, weight), None


@paddle.no_grad()
def _add_tied_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    product = paddle.matmul(gradient.flatten(0, -2), x.flatten(0, -2), transpose_x=True)  # (V, D)
    weight.grad = product if weight.grad is None else weight.grad.add_(product)


def tied_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, S, V) of `x` (B, S, D) with the token embedding (V, D)."""
    return _TiedProjection.apply(x, weight)
