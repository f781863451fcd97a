"""One graph with the forward and the backward of a stage. Nothing runs it: it is to be cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tf_impl.cut_graphs.tensors import dense, unbundled
from tf_impl.effects import custom_gradients, forget_gradients

Piece = Callable[..., tuple[tf.Tensor, dict[str, tf.Tensor]]]
"""(h, *extra) -> the piece's output, and what to report along with it, by name:

"mask" of the stage's output; "prediction", where the output is the loss; "layer_losses", what the
piece's layers add to the loss of the mini-batch, which is differentiated along with the output.
"""


@dataclass(frozen=True)
class Trace:
    """Forward and backward of a stage in one graph."""

    graph: Any
    inputs: list[tf.Tensor]  # x and the extras
    output: tf.Tensor  # y
    reported: dict[str, tf.Tensor]  # see Piece
    output_gradient: list[tf.Tensor]  # dy, or nothing where y is the loss
    input_gradient: tf.Tensor  # dx
    weight_gradients: list[tf.Tensor]  # dw
    num_forward: int  # operations of the forward; those made later are the backward's
    again: list[tf.Operation]  # a forward that B repeats

    @property
    def handed_on(self) -> list[tf.Tensor]:
        """y and, where it has one, its mask: what the next stage gets."""
        mask = self.reported.get("mask")
        return [self.output] if mask is None else [self.output, mask]


class _Recorded(NamedTuple):
    """Some units of a stage on a tape."""

    tape: tf.GradientTape
    start: tf.Tensor
    """What the gradient is taken to: the input, or the first stage's first activation."""
    output: tf.Tensor
    reported: dict[str, tf.Tensor]


def trace_stage(
    first: Callable[..., tf.Tensor] | None,
    rest: Sequence[Piece],
    variables: Sequence[tf.Variable],
    accumulators: Sequence[tf.Variable],
    signature: Sequence[tf.TensorSpec],
    is_last: bool,
    recomputed: bool = False,
) -> tuple[Trace, list[tf.Variable]]:
    """Return the trace of a stage, and the accumulators of the weights that have a gradient.

    The arguments are those of `functions.cut_stage`. Raises ValueError if the output does not
    depend differentiably on the input.
    """
    parts: dict[str, Any] = {}

    @tf.function(input_signature=signature, autograph=False)
    def forward_and_backward(x: tf.Tensor, *extra: tf.Tensor) -> None:
        graph = tf.compat.v1.get_default_graph()
        again: list[tf.Operation] = []
        if recomputed:
            starts, y, reported = _forward_alone(x, extra, first, rest)
        else:
            recorded = _record(x, extra, first, rest, variables)
            y, reported = recorded.output, recorded.reported
        num_forward = len(graph.get_operations())
        # Nothing runs this graph, so the output's gradient can be a placeholder: B's argument.
        dy = None if is_last else tf.compat.v1.placeholder(y.dtype, y.shape)
        if recomputed:
            dx, dw = _backward_again(starts, extra, first, rest, variables, dy, again)
        else:
            dx, dw = _differentiated(recorded, dy, variables)
        pairs = [(sum_, g) for sum_, g in zip(accumulators, dw, strict=True) if g is not None]
        parts.update(
            inputs=[x, *extra],
            output=unbundled(y),
            reported={name: unbundled(tensor) for name, tensor in reported.items()},
            num_forward=num_forward,
            again=again,
            output_gradient=[] if dy is None else [dy],
            input_gradient=unbundled(tf.convert_to_tensor(dx)),
            # Dense: the rows of an embedding's sparse gradient come once per token, so that squares
            # would not add up.
            weight_gradients=[_dense_where(sum_, g) for sum_, g in pairs],
            accumulators=[sum_ for sum_, _ in pairs],
        )

    graph = forward_and_backward.get_concrete_function().graph
    forget_gradients(custom_gradients(graph))  # it has been differentiated: above
    kept = parts.pop("accumulators")
    return Trace(graph=graph, **parts), kept


def _record(
    h: tf.Tensor,
    extra: Sequence[tf.Tensor],
    unit: Callable[..., tf.Tensor] | None,
    pieces: Sequence[Piece],
    variables: Sequence[tf.Variable],
) -> _Recorded:
    """Run `unit`, then `pieces`, on a tape."""
    # A tape would watch every variable that is read, also those that are not trained now.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        start = h if unit is None else unit(h, *extra)
        tape.watch(start)
        y, reported = start, dict[str, tf.Tensor]()
        for piece in pieces:
            y, reported = piece(y, *extra)
    return _Recorded(tape, start, y, reported)


def _differentiated(
    recorded: _Recorded, dy: tf.Tensor | None, variables: Sequence[tf.Variable]
) -> tuple[tf.Tensor, list[Any]]:
    """The gradients of the start and of the weights, None for a weight that has none. `dy` is None
    where the output is the loss.
    """
    tape, start, y, reported = recorded
    losses = [reported["layer_losses"]] if "layer_losses" in reported else []
    # A layer's own loss counts as it is, like the loss at the end: its gradient is 1.
    given = [tf.ones_like(y) if dy is None else dy, *map(tf.ones_like, losses)]
    dx, *dw = tape.gradient([y, *losses], [start, *variables], output_gradients=given)
    if dx is None:
        raise ValueError("the output of a stage does not depend differentiably on its input")
    return dx, dw


def _dense_where(sum_: tf.Variable, gradient: Any) -> tf.Tensor:
    """The gradient as one tensor, on the device of its sum."""
    with tf.device(sum_.device):
        return unbundled(dense(gradient, sum_.dtype))


def _forward_alone(
    x: tf.Tensor,
    extra: Sequence[tf.Tensor],
    first: Callable[..., tf.Tensor] | None,
    rest: Sequence[Piece],
) -> tuple[list[tf.Tensor], tf.Tensor, dict[str, tf.Tensor]]:
    """The forward without a tape: what each piece starts from, the output, and what is reported."""
    starts, y, reported = [], x, dict[str, tf.Tensor]()
    for k, piece in enumerate(rest):
        starts.append(y)
        y = first(y, *extra) if k == 0 and first is not None else y
        y, more = piece(y, *extra)
        if "layer_losses" in reported and "layer_losses" in more:
            more["layer_losses"] = reported["layer_losses"] + more["layer_losses"]
        reported |= more
    return starts, y, reported


def _backward_again(
    starts: Sequence[tf.Tensor],
    extra: Sequence[tf.Tensor],
    first: Callable[..., tf.Tensor] | None,
    rest: Sequence[Piece],
    variables: Sequence[tf.Variable],
    dy: tf.Tensor | None,
    again: list[tf.Operation],
) -> tuple[tf.Tensor, list[Any]]:
    """The backward, piece by piece from the last, each after a second forward of that piece, whose
    operations are added to `again`.
    """
    graph = tf.compat.v1.get_default_graph()
    dx, dw = dy, [None] * len(variables)
    for k, piece in reversed(list(enumerate(rest))):
        # A piece waits for the one behind it, or the activations of all would be there at once.
        before = len(graph.get_operations())
        with tf.control_dependencies([] if dx is None else [unbundled(dx)]):
            recorded = _record(starts[k], extra, first if k == 0 else None, [piece], variables)
        again += graph.get_operations()[before:]
        dx, more = _differentiated(recorded, dx, variables)
        # A weight is in one piece only: the layers that share one are within a piece.
        dw = [new if old is None else old for old, new in zip(dw, more, strict=True)]
    return dx, dw
