"""The heart of this implementation: the backward in two halves, B and W, or both at once.

F, B and W of a stage: a product, a tanh and another product (as in docs/schedules.md):

    F    h = tanh(x A)             y = h C
    B    dz = (dy Cᵀ) ⊙ (1 - h²)   dx = dz Aᵀ
    W    dA = xᵀ dz                dC = hᵀ dy

TensorFlow has no backward that could stop halfway. A tape differentiates in one go; keeping it for
a second call runs the shared part twice. But a traced function is a graph, that is data, and a
graph can be cut:

    x ──► F F F F ──► y              F   ancestors of the output                      x A, tanh, h C
          │ │   │ saved              B   ancestors of the input's gradient            dy Cᵀ, 1 - h², dz, dz Aᵀ
     dx ◄── B B ◄── dy                   that are not in F
            │ │ handed on            W   ancestors of the weights' gradients          xᵀ dz, hᵀ dy
            W W ──► dw                   that are in neither

Every operation belongs to one of the three, so none runs twice. What crosses a border is passed
explicitly: F returns what B or W will read ("saved": x and h), B returns what W will read ("handed
on": dz and dy). Those tensors are the stage's whole memory of a micro-batch, and dropping the last
reference frees them.

Words that only TensorFlow needs:

    cut        a stage's graph, sorted into F, B and W and made into three functions (`tf_impl.cut_graphs`)
    effect     what an operation does besides computing its output; it belongs to F, or to B if it is the gradient's own
    repeated   what depends on no data (reads of variables, constants): every function that needs it computes it
    reported   what F returns beside its output and what is saved: a mask, the prediction, the layers' own losses
"""  # noqa: E501

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_impl.cut_graphs.functions import StageFunctions


class Forward(NamedTuple):
    """What B needs of a micro-batch in flight."""

    functions: StageFunctions
    tensors: list[tf.Tensor]  # saved by F


class Waiting(NamedTuple):
    """What W needs of a micro-batch."""

    functions: StageFunctions
    tensors: list[tf.Tensor]  # saved by F or handed on by B


def backward(saved: Forward, gradient: tf.Tensor | None) -> tf.Tensor | None:
    """B and W at once: from the output's gradient (b, S, D) to the input's; None at the ends."""
    found = saved.functions.backward(*_given(gradient), *saved.tensors)
    return found[0] if found else None


def backward_input(saved: Forward, gradient: tf.Tensor | None) -> tuple[tf.Tensor | None, Waiting]:
    """B: the input's gradient, and what W needs."""
    functions, tensors = saved
    found = functions.backward_input(
        *_given(gradient), *(tensors[i] for i in functions.saved_for_input)
    )
    count = int(functions.has_input_gradient)
    for_weight = [*(tensors[i] for i in functions.saved_for_weight), *found[count:]]
    return found[0] if count else None, Waiting(functions, for_weight)


def backward_weight(waiting: Waiting) -> None:
    """W: adds to the weight gradients."""
    waiting.functions.backward_weight(*waiting.tensors)


def _given(gradient: tf.Tensor | None) -> tuple[tf.Tensor, ...]:
    return () if gradient is None else (gradient,)
