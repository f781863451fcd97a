"""The heart of this implementation: the backward in two halves, B and W, or both at once.

F, B and W of a stage: a product, a tanh and another product (as in docs/schedules.md):

    F    h = tanh(x A)             y = h C
    B    dz = (dy Cᵀ) ⊙ (1 - h²)   dx = dz Aᵀ
    W    dA = xᵀ dz                dC = hᵀ dy

Fleet has the means: `WeightGradStore`, the store of its zero-bubble pipelines. While the store is
enabled, a linear layer's backward gives the gradients of its input and bias at once and leaves the
product for its weight in the store:

    x ◄── · A ◄── tanh ◄── · C ◄── dy       held from F to B: the graph (x, h)
           └─ product       └─ product      held from B to W: xᵀ dz and hᵀ dy, not yet multiplied

B runs with the store enabled and takes what is left; W runs the products. Embeddings, norms and
biases get their gradients in B: they are cheap, and B runs in micro-batch order as W does. Source:
Qi et al. 2024, Zero Bubble Pipeline Parallelism, section 2.

Words that only Paddle needs:

    product   a call that W makes: the layer's input, its weight, the gradient of its output (`paddle_impl.split_linear`)
    merged    a linear layer whose backward is one operation, as where nothing is split (`merge_backward`)
    program   a unit that is traced, its backward included, on the track "best"; it is merged first (`paddle_impl.programs`)
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import paddle
from paddle import Tensor
from paddle.distributed.fleet.meta_parallel.zero_bubble_utils import WeightGradStore


@dataclass(slots=True)
class Forward:
    """What B needs of a micro-batch in flight."""

    x: Tensor | None
    output: (
        Tensor  # the loss, or a tensor that is left without memory: the next stage has the values
    )


Waiting = list[partial[None]]
"""What W needs of a micro-batch: the products of its gradients, as (input, weight, gradient)."""


def backward(saved: Forward, gradient: Tensor | None) -> Tensor | None:
    """B and W at once: from the output's gradient (b, S, D) to the input's; None at the ends."""
    # Also where `output` has lost its memory: autograd asks for its graph, not for its values.
    paddle.autograd.backward([saved.output], [gradient])
    return None if saved.x is None else saved.x.grad  # x is a leaf: it came from another rank


def backward_input(saved: Forward, gradient: Tensor | None) -> tuple[Tensor | None, Waiting]:
    """B: the input's gradient, and what W needs."""
    # Fleet would move the cache into a queue, from which W takes whatever is first; ours says whose
    # products it wants, so each micro-batch's cache is taken away as it is.
    WeightGradStore.enabled = True
    try:
        result = backward(saved, gradient)
        return result, WeightGradStore.cache
    finally:  # also after an error: the next job of this process starts clean
        WeightGradStore.enabled, WeightGradStore.cache = False, []


def backward_weight(waiting: Waiting) -> None:
    """W: adds the products that B left over to the weight gradients."""
    for add_product in waiting:
        add_product()
