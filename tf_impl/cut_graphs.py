"""Traces a stage once and cuts its graph into the functions F, B and W; `tf_impl.backward` shows
the idea.

Differs: only TensorFlow gives a graph as data that can be cut.

Four kinds of operations need care:
- What depends on no data (variable reads, constants, a transposed weight) is cheap and does not cross a border: every
  function that needs it repeats it. Weights are thus read where they are, never saved. They change
  only between steps.
- What has a side effect (advancing the state of Keras' dropout seed) belongs to F, and so does all that reads it; if it
  is the gradient's own, to B (`tf_impl.effects` says what has one).
- A copy, or a cast to a type of more bytes, holds nothing new: what crosses is the tensor that it was made from.
- A token has no gradient, so the first stage's B aims at the output of its first unit; otherwise
  everything would count as W, and the stage would have no B to speak of.

Recomputation (Chen et al. 2016; GPipe, Huang et al. 2019, section 2.3) asks nothing new of the cut:
the trace has the forward twice, and only the second one is differentiated. It is no ancestor of y,
so it falls to B, and all that crosses from F to B is what it starts from. (`tf.recompute_grad` does
the same, but out of sight of a B that aims into it.)

The idea of splitting the backward is the Zero Bubble paper's (Qi et al. 2024, section 2).
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from common.schedule.action import Op
from tf_impl.effects import REPEATED, is_repeatable
from tf_impl.executors import OnCallingThread

RECOMPUTED_EFFECT = (
    "a layer calls Python, draws numbers without a Keras seed, or assigns what is trained or is no "
    "Keras variable, and a "
    "second forward would do so again; expected recompute='none'"
)


@dataclass(frozen=True)
class StageFunctions:
    """The functions of one virtual stage. A dy of the last one (its output is the loss) is no
    argument at all.

    None for what no action of the stage's schedule calls: making a function takes longer than many
    steps.
    """

    forward: Any
    """(x, *extra) -> [y, *reported, *saved]; the extras are a mask of x, if it has one, then labels
    and the like
    """
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
    """Memory of one micro-batch between F and B, without the mini-batch itself. Tensors may share
    buffers, so it is an upper bound.
    """
    waiting_bytes: int
    """The same between B and W."""

    def on_calling_thread(self) -> StageFunctions:
        """Return the same functions, each run by the thread that calls it."""
        names = ("forward", "backward", "backward_input", "backward_weight")
        made = {name: function for name in names if (function := getattr(self, name)) is not None}
        return replace(self, **{name: OnCallingThread(function) for name, function in made.items()})


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


Piece = Callable[..., tuple[tf.Tensor, dict[str, tf.Tensor]]]
"""(h, *extra) -> the piece's output, and what to report along with it, by name:

"mask" of the stage's output; "prediction", where the output is the loss; "layer_losses", what the
piece's layers add to the loss of the mini-batch, which is differentiated along with the output.
"""


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
    """Trace a stage and cuts it.

    `first(x, *extra)` is the first stage's first unit, None on all others; `rest` are the other
    units, in pieces that B computes again, one after another, where `recomputed`. `signature`
    describes (x, *extra), with static shapes; the first `num_received` of them come from the stage
    before, the others with the mini-batch. The weight gradients are added to `accumulators`. `ops`
    are those of the stage's schedule. Must run in the replica context of the stage's strategy.
    Raises ValueError if the output does not depend differentiably on the stage's input, and for
    layers that cannot run twice.
    """
    with tf.device(device):
        trace, accumulators = trace_stage(
            first, rest, variables, accumulators, signature, is_last, recomputed
        )
    scissors = Scissors(trace, device)
    if not scissors.repeatable.issuperset(trace.again):
        raise ValueError(RECOMPUTED_EFFECT)
    if (
        (scissors.backward_input | scissors.backward_weight)
        & scissors.changing
        & scissors.repeatable
    ):
        raise ValueError(
            "the gradient of a layer reads a variable that its forward changes, and by then other "
            "micro-batches have "
            "changed it again; expected a gradient of the values that the forward has read"
        )
    f, b, w = scissors.forward, scissors.backward_input, scissors.backward_weight
    dy, dx = trace.output_gradient, [] if first is not None else [trace.input_gradient]
    dw = trace.weight_gradients
    additions = list(zip(accumulators, dw, strict=True))
    for_input = scissors.crossing(b - {t.op for t in dy}, f, dx)
    for_weight = scissors.crossing(w, f, dw)
    for_later = scissors.crossing(w, b, dw)
    saved = unique([*for_input, *for_weight])
    place = {tensor.ref(): i for i, tensor in enumerate(saved)}
    of_batch = trace.inputs if first is not None else trace.inputs[num_received:]
    forward_results = [trace.output, *trace.reported.values(), *saved]
    handed_on = [
        trace.output,
        *(tensor for name, tensor in trace.reported.items() if name == "mask"),
    ]
    function = scissors.function
    with tf.device(device):
        return StageFunctions(
            forward=function(trace.inputs, forward_results, scissors.forward_effects),
            backward=function([*dy, *saved], dx, scissors.backward_effects, additions)
            if Op.BW in ops
            else None,
            backward_input=function([*dy, *for_input], [*dx, *for_later], scissors.backward_effects)
            if Op.B in ops
            else None,
            backward_weight=function([*for_weight, *for_later], [], (), additions)
            if Op.W in ops
            else None,
            has_input_gradient=first is None,
            handed_on=tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in handed_on),
            reported=tuple(trace.reported),
            forward_part=functools.partial(scissors.forward_part, trace.inputs[:num_received]),
            saved_for_input=tuple(place[tensor.ref()] for tensor in for_input),
            saved_for_weight=tuple(place[tensor.ref()] for tensor in for_weight),
            saved_bytes=memory_bytes(saved, of_batch),
            waiting_bytes=memory_bytes([*for_weight, *for_later], of_batch),
        )


def trace_stage(
    first: Callable[..., tf.Tensor] | None,
    rest: Sequence[Piece],
    variables: Sequence[tf.Variable],
    accumulators: Sequence[tf.Variable],
    signature: Sequence[tf.TensorSpec],
    is_last: bool,
    recomputed: bool = False,
) -> tuple[Trace, list[tf.Variable]]:
    """One graph with a stage's forward and backward, and the accumulators of the weights that have
    a gradient.
    """
    parts: dict[str, Any] = {}

    @tf.function(input_signature=signature, autograph=False)
    def forward_and_backward(x: tf.Tensor, *extra: tf.Tensor) -> None:
        graph = tf.compat.v1.get_default_graph()

        def recorded(
            h: tf.Tensor, pieces: Sequence[Piece], unit: Callable[..., tf.Tensor] | None
        ) -> Any:
            """Run `unit`, then `pieces`, on a tape: the tape, what the pieces start from, their
            output and reports.
            """
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(variables)
                start = h if unit is None else unit(h, *extra)
                tape.watch(start)
                y, reported = start, {}
                for piece in pieces:
                    y, reported = piece(y, *extra)
            return tape, start, y, reported

        def differentiated(
            tape: tf.GradientTape,
            start: tf.Tensor,
            y: tf.Tensor,
            dy: tf.Tensor | None,
            reported: dict[str, tf.Tensor],
        ) -> Any:
            losses = [reported["layer_losses"]] if "layer_losses" in reported else []
            given = [tf.ones_like(t) if t is not y or dy is None else dy for t in (y, *losses)]
            dx, *dw = tape.gradient([y, *losses], [start, *variables], output_gradients=given)
            if dx is None:
                raise ValueError(
                    "the output of a stage does not depend differentiably on its input"
                )
            return dx, dw

        again: list[tf.Operation] = []
        if not recomputed:
            tape, start, y, reported = recorded(x, rest, first)
        else:
            starts, y, reported = [], x, {}
            for k, piece in enumerate(rest):
                starts.append(y)
                y = first(y, *extra) if k == 0 and first is not None else y
                y, more = piece(y, *extra)
                if "layer_losses" in reported and "layer_losses" in more:
                    more["layer_losses"] = reported["layer_losses"] + more["layer_losses"]
                reported |= more
        num_forward = len(graph.get_operations())
        # Nothing runs this graph, so the gradient of the output can be a placeholder that B gets as
        # its argument.
        dy = None if is_last else tf.compat.v1.placeholder(y.dtype, y.shape)
        if not recomputed:
            dx, dw = differentiated(tape, start, y, dy, reported)
        else:
            dx, dw = dy, [None] * len(variables)
            for k, piece in reversed(list(enumerate(rest))):
                # A piece waits for the one behind it, or the activations of all would be there at
                # once.
                before = len(graph.get_operations())
                with tf.control_dependencies([] if dx is None else [unbundled(dx)]):
                    tape, start, y_again, more = recorded(
                        starts[k], [piece], first if k == 0 else None
                    )
                again += graph.get_operations()[before:]
                dx, more = differentiated(tape, start, y_again, dx, more)
                dw = [new if old is None else old for old, new in zip(dw, more, strict=True)]
        pairs = [
            (variable, g) for variable, g in zip(accumulators, dw, strict=True) if g is not None
        ]
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
            weight_gradients=[unbundled(dense(g, variable.dtype)) for variable, g in pairs],
            accumulators=[variable for variable, _ in pairs],
        )

    graph = forward_and_backward.get_concrete_function().graph
    kept = parts.pop("accumulators")
    return Trace(graph=graph, **parts), kept


class Scissors:
    """Sorts a trace's operations into F, B and W, and makes functions of them."""

    def __init__(self, trace: Trace, device: str | None = None) -> None:
        self.trace, self.device = trace, device
        self.operations = trace.graph.get_operations()
        self.graph_def = trace.graph.as_graph_def()
        self.nodes = {node.name: node for node in self.graph_def.node}
        self.captured = {inner.name: outer for outer, inner in trace.graph.captures}
        library = {
            function.signature.name: function for function in self.graph_def.library.function
        }
        self.repeatable = {
            op for op in self.operations if is_repeatable(self.nodes[op.name], library)
        }
        must_run = {
            op
            for op in trace.graph.control_outputs
            if not is_repeatable(self.nodes[op.name], library, REPEATED - {"Assert"})
        }
        of_forward = set(self.operations[: trace.num_forward])
        self.forward_effects = [op for op in self.operations if op in must_run & of_forward]
        self.backward_effects = [
            op
            for op in self.operations
            if op in must_run - of_forward - set(trace.again) and op not in self.repeatable
        ]
        self.dependent = self._dependent_on_data()
        # What reads a state is the forward's even where only B needs it: in B it would be another
        # micro-batch's.
        outputs = [t.op for t in (trace.output, *trace.reported.values())]
        self.forward = ancestors([*outputs, *self.forward_effects, *(self.changing & of_forward)])
        self.forward |= {t.op for t in trace.inputs}
        self.backward_input = (
            ancestors([trace.input_gradient.op, *self.backward_effects]) - self.forward
        )
        self.backward_weight = (
            ancestors([t.op for t in trace.weight_gradients]) - self.forward - self.backward_input
        )

    def _dependent_on_data(self) -> set[tf.Operation]:
        """The operations whose results differ between micro-batches; all others may be repeated."""
        effects = set(self.operations) - self.repeatable
        changed = {t.ref() for op in effects for t in op.inputs if t.dtype == tf.resource}
        waiting = [t.op for t in (*self.trace.inputs, *self.trace.output_gradient)]
        self.changing = {
            op
            for op in self.operations
            if op in effects or any(t.ref() in changed for t in op.inputs)
        }
        waiting += self.changing
        found: set[tf.Operation] = set()
        while waiting:
            op = waiting.pop()
            if op not in found:
                found.add(op)
                waiting += [consumer for output in op.outputs for consumer in output.consumers()]
        return found

    def crossing(
        self, users: set[tf.Operation], source: set[tf.Operation], results: Iterable[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Return the tensors that `source` computes and `users` (or the `results`) need."""
        needed = [source_of(t) for op in self.operations if op in users for t in op.inputs] + list(
            results
        )
        return unique(t for t in needed if t.op in source and t.op in self.dependent)

    def function(
        self,
        arguments: Sequence[tf.Tensor],
        results: Sequence[tf.Tensor],
        side_effects: Sequence[tf.Operation] = (),
        additions: Sequence[tuple[tf.Variable, tf.Tensor]] = (),
    ) -> Any:
        """Return the part of the graph from `arguments` to `results` as a concrete function.

        `additions` are (accumulator, gradient) pairs: the gradient is added inside the function, in
        place.
        """
        wanted = [*results, *(gradient for _, gradient in additions)]
        given = {t.ref() for t in arguments}
        part = ancestors([t.op for t in wanted if t.ref() not in given] + list(side_effects), given)
        graph_def = self._graph_def(part)
        consumed = {
            name if ":" in name else f"{name}:0" for node in graph_def.node for name in node.input
        }

        @tf.function(
            input_signature=[tf.TensorSpec(t.shape, t.dtype) for t in arguments], autograph=False
        )
        def piece(*values: tf.Tensor) -> list[tf.Tensor]:
            known = {t.name: value for t, value in zip(arguments, values, strict=True)}
            graph = tf.compat.v1.get_default_graph()
            # Loops, branches and inner functions: as the graph's own, they live as long as what is
            # cut from it. (Those in a GraphDef's library would be copies, under names that
            # TensorFlow forgets along with the originals.)
            for function in self.trace.graph._functions.values():
                graph._add_function_recursive(function)
            variables = {
                name: graph.capture(outer)
                for name, outer in self.captured.items()
                if name in consumed
            }
            computed = [t.name for t in wanted if t.name not in known]
            imported = tf.graph_util.import_graph_def(
                graph_def,
                {name: value for name, value in (known | variables).items() if name in consumed},
                computed,
                name="",
            )
            known |= dict(zip(computed, imported, strict=True))
            for accumulator, gradient in additions:
                accumulator.assign_add(
                    tf.cast(known[gradient.name], accumulator.dtype), read_value=False
                )
            return [known[t.name] for t in results]

        return piece.get_concrete_function()

    def forward_part(
        self, received: Sequence[tf.Tensor], wanted: Sequence[bool]
    ) -> tuple[Any, list[bool]]:
        """As `StageFunctions.forward_part`. Raises ValueError if that depends on a state that the
        forward changes.
        """
        outputs = [
            self.trace.output,
            *(t for name, t in self.trace.reported.items() if name == "mask"),
        ]
        results = [t for t, is_wanted in zip(outputs, wanted, strict=True) if is_wanted]
        part = ancestors(t.op for t in results)
        if part & self.changing:
            raise ValueError(
                "the mask of the predictions depends on a layer with a state or random numbers, so "
                "the labels that count "
                "are not known before the backward; expected a mask that is made before such layers"
            )
        given = [t for t in received if t.op in part]
        with tf.device(self.device):
            return self.function(given, results), [t.op in part for t in received]

    def _graph_def(self, part: set[tf.Operation]) -> Any:
        names = {op.name for op in part}
        graph_def = tf.compat.v1.GraphDef(versions=self.graph_def.versions)
        for op in self.operations:
            if op in part and f"{op.name}:0" not in self.captured:
                node = graph_def.node.add()
                node.CopyFrom(self.nodes[op.name])
                node.attr.pop("_class", None)  # "same device as", possibly beyond the cut
                controls = [
                    name for name in node.input if name.startswith("^") and name[1:] in names
                ]
                del node.input[:]
                node.input.extend([*(unbundled(t).name for t in op.inputs), *controls])
        return graph_def


def dense(gradient: tf.Tensor | tf.IndexedSlices, dtype: tf.DType) -> tf.Tensor:
    """Return the gradient as one tensor; the rows of an embedding's are added up in `dtype`, that
    of their sum.
    """
    if isinstance(gradient, tf.IndexedSlices) and gradient.dtype != dtype:
        gradient = tf.IndexedSlices(
            tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape
        )
    return tf.convert_to_tensor(gradient)


def unbundled(tensor: tf.Tensor) -> tf.Tensor:
    """Return what an IdentityN copies. A custom gradient bundles its results and arguments in one,
    and nobody needs them all.
    """
    while tensor.op.type == "IdentityN":
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def source_of(tensor: tf.Tensor) -> tf.Tensor:
    """Return the tensor that has the values of this one in the fewest bytes: what it is a copy of,
    or was cast from.
    """
    while True:
        tensor = unbundled(tensor)
        op = tensor.op
        if op.type == "Identity" or (
            op.type == "Cast" and op.inputs[0].dtype.size < tensor.dtype.size
        ):
            tensor = op.inputs[0]
        else:
            return tensor


def ancestors(operations: Iterable[tf.Operation], given: Iterable[Any] = ()) -> set[tf.Operation]:
    """`operations` and all that they need, not looking behind the `given` tensors (references)."""
    given, found, waiting = set(given), set(), list(operations)
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [t.op for t in map(unbundled, op.inputs) if t.ref() not in given]
    return found


def memory_bytes(tensors: Iterable[tf.Tensor], not_counted: Iterable[tf.Tensor] = ()) -> int:
    """Return the sizes of `tensors` without those that are `not_counted`, and without those of no
    static size: a loop's lists.
    """
    left_out = {t.ref() for t in not_counted}
    return sum(
        (t.shape.num_elements() or 0) * t.dtype.size for t in tensors if t.ref() not in left_out
    )


def unique(tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    return list({t.ref(): t for t in tensors}.values())
