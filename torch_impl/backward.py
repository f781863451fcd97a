"""The heart of this implementation: the backward in two halves, B and W, or both at once.

F, B and W of a stage: a product, a tanh and another product (as in docs/schedules.md):

    F    h = tanh(x A)             y = h C
    B    dz = (dy Cᵀ) ⊙ (1 - h²)   dx = dz Aᵀ
    W    dA = xᵀ dz                dC = hᵀ dy

B asks autograd for the gradients of `x` *and of the output of every linear and embedding layer*
(autograd takes a place in its graph, a `GradientEdge`, as it takes a tensor). Here x A and y:

    x ◄── · A ◄── tanh ◄── · C ◄── dy       held from F to B: the graph (x, h) and the taps
           └─ tap: dz       └─ tap: dy      held from B to W: (layer A, x, dz) and (layer C, h, dy)

W needs no graph any more: a layer's weight gradient is the product of what went in and what its tap
gave. So the split repeats no forward and does no work twice, the graph is freed in B, and products
add straight into the gradients. BW does the same products, each as soon as autograd comes to its
tap, while dz and dy are still in the processor's cache. So every schedule gives the same bits.

Words that only PyTorch needs:

    tap       the place in the graph behind a linear or embedding layer, with that layer's input (`torch_impl.taps`)
    direct    parameters without a tap, those of the norms: their gradients are small, and B computes them
    again     what goes into the layers of a recomputed piece: known when B has run its forward a second time
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_impl.gradients import gradient_of
from torch_impl.shards import OwnTokens
from torch_impl.taps import Tap


@dataclass(slots=True)
class Forward:
    """What B needs of a micro-batch in flight."""

    x: Tensor | None
    output: GradientEdge  # not the tensor: the next stage owns that
    taps: list[Tap]
    again: list[list[Tensor]]
    """By recomputed piece: what goes into its linear layers, from when B has run it."""
    direct: list[nn.Parameter]
    """`Chunk.direct`"""


Waiting = list[tuple[nn.Linear | nn.Embedding, Tensor, Tensor]]
"""What W needs of a micro-batch: each layer with its input and its output's gradient."""


def backward(saved: Forward, gradient: Tensor | None) -> Tensor | None:
    """B and W at once: from the output's gradient (b, S, D) to the input's; None at the ends."""
    later = []
    for tap in saved.taps:
        # The backward need not go through an embedding, and what went into a recomputed layer is
        # not there yet.
        if tap.x is None or isinstance(tap.layer, nn.Embedding):
            later.append(tap)
        else:
            _add_on_the_way(tap.layer, tap.x, tap.output)
    saved.taps = later
    result, waiting = backward_input(saved, gradient)
    backward_weight(waiting)
    return result


def backward_input(saved: Forward, gradient: Tensor | None) -> tuple[Tensor | None, Waiting]:
    """B: the input's gradient, and what W needs."""
    inputs = [] if saved.x is None else [saved.x]
    wanted = [*inputs, *saved.direct, *(tap.output for tap in saved.taps)]
    # `grad` takes a mixture of tensors and places; its annotation takes one or the other.
    found = torch.autograd.grad(saved.output, cast(Sequence[Tensor], wanted), gradient)
    first_direct, first_tap = len(inputs), len(inputs) + len(saved.direct)
    for parameter, piece in zip(saved.direct, found[first_direct:first_tap], strict=True):
        gradient_of(parameter).add_(piece)
    # Recomputed layers run in the taps' order: each tap without an input takes B's next one.
    again = chain.from_iterable(saved.again)
    waiting = [
        (tap.layer, next(again) if tap.x is None else tap.x, piece)
        for tap, piece in zip(saved.taps, found[first_tap:], strict=True)
    ]
    return found[0] if inputs else None, waiting


def _add_on_the_way(layer: nn.Linear, x: Tensor, output: GradientEdge) -> None:
    """Have autograd add the layer's weight gradient when it comes to the tap at `output`."""
    number = output.output_nr

    # It must not hold the edge, which holds the node that holds it: such a ring stays in memory
    # until Python looks for rings.
    def add(gradients: tuple[Tensor, ...]) -> None:
        _add_weight_gradient(layer, x, gradients[number])

    output.node.register_prehook(add)


@torch.no_grad()
def backward_weight(waiting: Waiting) -> None:
    """W: adds the products that B left over to the weight gradients."""
    for layer, x, gradient in waiting:
        _add_weight_gradient(layer, x, gradient)


def _add_weight_gradient(layer: nn.Linear | nn.Embedding, x: Tensor, gradient: Tensor) -> None:
    """Adds to the layer's gradients what `x` (..., I) and the gradient of its output (..., O) give.

    The sums may have a higher precision than the product, which is then rounded before it is added.
    """
    rows = gradient.flatten(0, -2)  # (N, O)
    match layer:
        case nn.Linear():
            total = gradient_of(layer.weight)
            if total.dtype is rows.dtype:
                total.addmm_(rows.T, x.flatten(0, -2))  # (O, I) += (O, N) (N, I)
            else:
                total += rows.T @ x.flatten(0, -2)
            if layer.bias is not None:
                gradient_of(layer.bias).add_(rows.sum(0, dtype=total.dtype))
        case nn.Embedding():
            total = gradient_of(layer.weight)
            places = layer.places(x) if isinstance(layer, OwnTokens) else x  # (B, S)
            total.index_add_(0, places.flatten(), rows.to(total.dtype))
