"""The backward in two halves, by fleet's own means: `WeightGradStore`, the store of its zero-bubble pipelines.

While the store is enabled, a linear layer's backward gives the gradients of its input and bias at once and leaves the
product for its weight in the store. B runs with the store enabled and takes what is left; W runs the products later.
Embeddings, norms and biases get their gradients in B: they are cheap, and B runs in micro-batch order as W does.
Source: Zero Bubble Pipeline Parallelism (Qi et al. 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import SplitBWLinear as Linear
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import WeightGradStore

__all__ = ["Linear", "defer_weight_gradients", "tied_projection"]

Product = Callable[[], None]


def defer_weight_gradients(backward: Callable[[], None]) -> list[Product]:
    """Runs `backward` without the products for the linear layers' weights and returns these."""
    WeightGradStore.enabled = True
    try:
        backward()
        return WeightGradStore.cache
    finally:
        WeightGradStore.enabled, WeightGradStore.cache = False, []


class _TiedProjection(PyLayer):
    """`x @ weight.T` for a weight (V, D): fleet's SplitBWLinear has only weights (D, V)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return paddle.matmul(x, weight, transpose_y=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensor()

        @paddle.no_grad()
        def add_weight_gradient() -> None:
            product = paddle.matmul(gradient.flatten(0, -2), x.flatten(0, -2), transpose_x=True)  # (V, D)
            weight.grad = product if weight.grad is None else weight.grad.add_(product)

        if WeightGradStore.enabled:
            WeightGradStore.put(add_weight_gradient)
        else:
            add_weight_gradient()
        return paddle.matmul(gradient, weight), None


def tied_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, S, V) of `x` (B, S, D) with the token embedding (V, D)."""
    return _TiedProjection.apply(x, weight)
