"""The functions F, B and W of a stage, and what each needs of the ones before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from common.schedule.action import Op
from tf_impl.cut_graphs.scissors import Scissors
from tf_impl.cut_graphs.tensors import memory_bytes, unique
from tf_impl.cut_graphs.trace import Piece, trace_stage
from tf_impl.executors import OnCallingThread

RECOMPUTED_EFFECT = (
    "a layer calls Python, draws numbers without a Keras seed, or assigns what is trained or is no "
    "Keras variable, and a second forward would do so again; expected recompute='none'"
)
CHANGED_SINCE = (
    "the gradient of a layer reads a variable that its forward changes, and by then other "
    "micro-batches have changed it again; expected a gradient of the values that the forward has "
    "read"
)


@dataclass(frozen=True)
class StageFunctions:
    """The functions of one virtual stage. The last one, whose output is the loss, has no dy.

    None for what no action of the schedule calls: making a function takes longer than many steps.
    """

    forward: Any
    """(x, *extra) -> [y, *reported, *saved]; the extras: a mask of x, labels and the like"""
    backward: Any
    """(*dy, *saved) -> [*dx]; adds to the weight gradients"""
    backward_input: Any
    """(*dy, *(saved[i] for i in saved_for_input)) -> [*dx, *handed_on]"""
    backward_weight: Any
    """(*(saved[i] for i in saved_for_weight), *handed_on) -> []; adds to the weight gradients"""
    has_input_gradient: bool
    """Not where the input is tokens."""
    handed_on: tuple[tf.TensorSpec, ...]
    """The output and, where it has one, its mask."""
    reported: tuple[str, ...]
    """What comes after y, besides what is saved: see `Piece`."""
    forward_part: Callable[[Sequence[bool]], tuple[Any, list[bool]]]
    """Which of (y, its mask) -> a function for them alone, and which of (x, its mask) it takes."""
    saved_for_input: tuple[int, ...]
    saved_for_weight: tuple[int, ...]
    saved_bytes: int
    """Memory of one micro-batch between F and B on the stage's device, without the mini-batch
    itself. Tensors may share buffers, so it is an upper bound.
    """
    waiting_bytes: int
    """The same between B and W."""

    def made(self) -> dict[str, Any]:
        """Return the functions that there are, by name."""
        names = ("forward", "backward", "backward_input", "backward_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def on_calling_thread(self) -> StageFunctions:
        """Return the same functions, each run by the thread that calls it."""
        changes: dict[str, Any] = {name: OnCallingThread(f) for name, f in self.made().items()}
        return replace(self, **changes)


def cut_stage(
    first: Callable[..., tf.Tensor] | None,
    rest: Sequence[Piece],
    variables: Sequence[tf.Variable],
    accumulators: Sequence[tf.Variable],
    signature: Sequence[tf.TensorSpec],
    device: str,
    is_last: bool,
    ops: Collection[Op],
    recomputed: bool = False,
    num_received: int = 1,
) -> StageFunctions:
    """Trace a stage and cut it.

    `first(x, *extra)` is the first stage's first unit, None on all others; `rest` are the other
    units, in pieces that B computes again, one after another, where `recomputed`. `signature`
    describes (x, *extra), with static shapes; the first `num_received` of them come from the stage
    before, the others with the mini-batch. The weight gradients are added to `accumulators`. `ops`
    are those of the stage's schedule. Must run in the replica context of the stage's strategy.

    Raises ValueError if the output does not depend differentiably on the stage's input, and for
    layers that cannot run twice.
    """
    with tf.device(device):
        trace, sums = trace_stage(
            first, rest, variables, accumulators, signature, is_last, recomputed
        )
    scissors = Scissors(trace, device)
    if not scissors.repeatable.issuperset(trace.again):
        raise ValueError(RECOMPUTED_EFFECT)
    f, b, w = scissors.forward, scissors.backward_input, scissors.backward_weight
    if (b | w) & scissors.changing & scissors.repeatable:
        raise ValueError(CHANGED_SINCE)
    dy, dx = trace.output_gradient, [] if first is not None else [trace.input_gradient]
    dw = trace.weight_gradients
    additions = list(zip(sums, dw, strict=True))
    # The borders: from F to B, from F to W, from B to W. dy is B's argument and needs no saving.
    for_input = scissors.crossing(b - {t.op for t in dy}, f, dx)
    for_weight = scissors.crossing(w, f, dw)
    for_later = scissors.crossing(w, b, dw)
    saved = unique([*for_input, *for_weight])  # what both need is saved once
    place = {tensor.ref(): i for i, tensor in enumerate(saved)}
    of_batch = trace.inputs if first is not None else trace.inputs[num_received:]
    function, effects = scissors.function, scissors.backward_effects
    with tf.device(device):
        return StageFunctions(
            forward=function(
                trace.inputs,
                [trace.output, *trace.reported.values(), *saved],
                scissors.forward_effects,
            ),
            backward=function([*dy, *saved], dx, effects, additions) if Op.BW in ops else None,
            backward_input=function([*dy, *for_input], [*dx, *for_later], effects)
            if Op.B in ops
            else None,
            backward_weight=function([*for_weight, *for_later], [], (), additions)
            if Op.W in ops
            else None,
            has_input_gradient=first is None,
            handed_on=tuple(tf.TensorSpec(t.shape, t.dtype) for t in trace.handed_on),
            reported=tuple(trace.reported),
            forward_part=functools.partial(scissors.forward_part, trace.inputs[:num_received]),
            saved_for_input=tuple(place[tensor.ref()] for tensor in for_input),
            saved_for_weight=tuple(place[tensor.ref()] for tensor in for_weight),
            saved_bytes=memory_bytes(saved, of_batch),
            waiting_bytes=memory_bytes([*for_weight, *for_later], of_batch),
        )
