"""The heart of this implementation: one stage, traced once, cut into the functions F, B and W.

TensorFlow has no backward that could stop halfway. A tape differentiates in one go; keeping it for a second call
runs the shared part twice. But a traced function is a graph, that is data, and a graph can be cut:

    x ──► F F F F ──► y              F   ancestors of the output
          │ │   │ saved              B   ancestors of the input's gradient that are not in F
     dx ◄── B B ◄── dy               W   ancestors of the weights' gradients that are in neither
            │ │ handed on
            W W ──► dw               Every operation belongs to one of the three, so none runs twice.

What crosses a border is passed explicitly: F returns what B or W will read ("saved"), B returns what W will read
("handed on"). Those tensors are the stage's whole memory of a micro-batch, and dropping the last reference frees them.

Three kinds of operations need care:
- What depends on no data (variable reads, constants, a transposed weight) is cheap and does not cross a border: every
  function that needs it repeats it. Weights are thus read where they are, never saved. They change only between steps.
- What has a side effect (advancing the state of Keras' dropout seed) belongs to F, and so does all that reads it.
- A token has no gradient, so the first stage's B aims at the output of its first unit; otherwise
  everything would count as W, and the stage would have no B to speak of.

The idea of splitting the backward is the Zero Bubble paper's (Qi et al. 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

REPEATED = frozenset({"ReadVariableOp", "VarHandleOp", "Placeholder", "Const"})
"""Stateful or not, these are repeated where they are needed, never saved."""


@dataclass(frozen=True)
class StageFunctions:
    """The functions of one virtual stage. A dy of the last one (its output is the loss) is no argument at all."""

    forward: Any
    """(x, *extra) -> [y, *reported, *saved]"""
    backward: Any
    """(*dy, *saved) -> [*dx]; adds to the weight gradients"""
    backward_input: Any
    """(*dy, *(saved[i] for i in saved_for_input)) -> [*dx, *handed_on]"""
    backward_weight: Any
    """(*(saved[i] for i in saved_for_weight), *handed_on) -> []; adds to the weight gradients"""
    output: tf.TensorSpec
    num_reported: int
    saved_for_input: tuple[int, ...]
    saved_for_weight: tuple[int, ...]
    saved_bytes: int
    """Memory of one micro-batch between F and B. Tensors may share buffers, so it is an upper bound."""

    def on_calling_thread(self) -> StageFunctions:
        """The same functions, each run by the thread that calls it."""
        names = ("forward", "backward", "backward_input", "backward_weight")
        return replace(self, **{name: OnCallingThread(getattr(self, name)) for name in names})


class OnCallingThread:
    """A concrete function, called as an operation: TensorFlow's own call hands it to a thread of its pool.

    There it would start anew on some core, with that core's caches. Its Python also checks every argument against the
    signature, for 0.9 ms at the 71 arguments of a W of 18 ms, with the lock that the other stages need.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._captured, self._types = list(function.captured_inputs), [output.dtype for output in function.outputs]
        config = tf.compat.v1.ConfigProto()  # an operation does not look at `tf.config`
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        self._config = config.SerializeToString()

    def __call__(self, *arguments: tf.Tensor) -> list[tf.Tensor]:
        found = tf.raw_ops.StatefulPartitionedCall(
            args=[*arguments, *self._captured],
            Tout=self._types,
            f=self.function,
            config_proto=self._config,
            executor_type="SINGLE_THREADED_EXECUTOR",
        )
        return found if self._types else []


@dataclass(frozen=True)
class Trace:
    """Forward and backward of a stage in one graph."""

    graph: Any
    inputs: list[tf.Tensor]  # x and the extras
    output: tf.Tensor  # y
    reported: list[tf.Tensor]
    output_gradient: list[tf.Tensor]  # dy, or nothing where y is the loss
    input_gradient: tf.Tensor  # dx
    weight_gradients: list[tf.Tensor]  # dw


def cut_stage(
    first: Callable[..., tf.Tensor] | None,
    rest: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]],
    variables: Sequence[tf.Variable],
    accumulators: Sequence[tf.Variable],
    signature: Sequence[tf.TensorSpec],
    device: str,
    is_last: bool,
) -> StageFunctions:
    """Traces a stage and cuts it.

    `first(x, *extra)` is the first stage's first unit, None on all others; `rest(h, *extra)` gives the output and
    a list of tensors to report along with it. `signature` describes (x, *extra), with static shapes. The
    weight gradients are added to `accumulators`. Must run in the replica context of the stage's strategy.
    Raises ValueError if the output does not depend differentiably on the stage's input.
    """
    with tf.device(device):
        trace, accumulators = trace_stage(first, rest, variables, accumulators, signature, is_last)
    scissors = Scissors(trace)
    f, b, w = scissors.forward, scissors.backward_input, scissors.backward_weight
    dy, dx = trace.output_gradient, [] if first is not None else [trace.input_gradient]
    dw = trace.weight_gradients
    for_input = scissors.crossing(b - {t.op for t in dy}, f, dx)
    for_weight = scissors.crossing(w, f, dw)
    handed_on = scissors.crossing(w, b, dw)
    saved = unique([*for_input, *for_weight])
    place = {tensor.ref(): i for i, tensor in enumerate(saved)}
    forward_results = [trace.output, *trace.reported, *saved]
    with tf.device(device):
        return StageFunctions(
            forward=scissors.function(trace.inputs, forward_results, scissors.side_effects),
            backward=scissors.function([*dy, *saved], dx, (), list(zip(accumulators, dw, strict=True))),
            backward_input=scissors.function([*dy, *for_input], [*dx, *handed_on]),
            backward_weight=scissors.function(
                [*for_weight, *handed_on], [], (), list(zip(accumulators, dw, strict=True))
            ),
            output=tf.TensorSpec(trace.output.shape, trace.output.dtype),
            num_reported=len(trace.reported),
            saved_for_input=tuple(place[tensor.ref()] for tensor in for_input),
            saved_for_weight=tuple(place[tensor.ref()] for tensor in for_weight),
            saved_bytes=sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in saved),
        )


def trace_stage(
    first: Callable[..., tf.Tensor] | None,
    rest: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]],
    variables: Sequence[tf.Variable],
    accumulators: Sequence[tf.Variable],
    signature: Sequence[tf.TensorSpec],
    is_last: bool,
) -> tuple[Trace, list[tf.Variable]]:
    """One graph with a stage's forward and backward, and the accumulators of the weights that have a gradient."""
    parts: dict[str, Any] = {}

    @tf.function(input_signature=signature, autograph=False)
    def forward_and_backward(x: tf.Tensor, *extra: tf.Tensor) -> None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            h = x if first is None else first(x, *extra)
            tape.watch(h)
            y, reported = rest(h, *extra)
        # Nothing runs this graph, so the gradient of the output can be a placeholder that B gets as its argument.
        dy = None if is_last else tf.compat.v1.placeholder(y.dtype, y.shape)
        dx, *dw = tape.gradient(y, [h, *variables], output_gradients=dy)
        if dx is None:
            raise ValueError("the output of a stage does not depend differentiably on its input")
        pairs = [(variable, g) for variable, g in zip(accumulators, dw, strict=True) if g is not None]
        parts.update(
            inputs=[x, *extra],
            output=y,
            reported=list(reported),
            output_gradient=[] if dy is None else [dy],
            input_gradient=tf.convert_to_tensor(dx),
            # Dense: the rows of an embedding's sparse gradient come once per token, so that squares would not add up.
            weight_gradients=[tf.convert_to_tensor(g) for _, g in pairs],
            accumulators=[variable for variable, _ in pairs],
        )

    graph = forward_and_backward.get_concrete_function().graph
    kept = parts.pop("accumulators")
    return Trace(graph=graph, **parts), kept


class Scissors:
    """Sorts a trace's operations into F, B and W, and makes functions of them."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.operations = trace.graph.get_operations()
        self.graph_def = trace.graph.as_graph_def()
        self.nodes = {node.name: node for node in self.graph_def.node}
        self.captured = {inner.name: outer for outer, inner in trace.graph.captures}
        self.side_effects = list(trace.graph.control_outputs)
        self.dependent = self._dependent_on_data()
        self.forward = ancestors([t.op for t in (trace.output, *trace.reported)] + self.side_effects)
        self.forward |= {t.op for t in trace.inputs}
        self.backward_input = ancestors([trace.input_gradient.op]) - self.forward
        self.backward_weight = ancestors([t.op for t in trace.weight_gradients]) - self.forward - self.backward_input

    def _dependent_on_data(self) -> set[tf.Operation]:
        """The operations whose results differ between micro-batches; all others may be repeated."""
        data = {t.op for t in (*self.trace.inputs, *self.trace.output_gradient)}
        assigned = {op.inputs[0].ref() for op in self.operations if op.type.startswith("Assign")}
        for op in self.operations:  # in topological order
            reads = any(t.op in data or t.ref() in assigned for t in op.inputs)
            if reads or (op.op_def.is_stateful and op.type not in REPEATED):
                data.add(op)
        return data

    def crossing(
        self, users: set[tf.Operation], source: set[tf.Operation], results: Iterable[tf.Tensor]
    ) -> list[tf.Tensor]:
        """The tensors that `source` computes and `users` (or the `results`) need."""
        needed = [t for op in self.operations if op in users for t in op.inputs] + list(results)
        return unique(t for t in needed if t.op in source and t.op in self.dependent)

    def function(
        self,
        arguments: Sequence[tf.Tensor],
        results: Sequence[tf.Tensor],
        side_effects: Sequence[tf.Operation] = (),
        additions: Sequence[tuple[tf.Variable, tf.Tensor]] = (),
    ) -> Any:
        """The part of the graph from `arguments` to `results` as a concrete function.

        `additions` are (accumulator, gradient) pairs: the gradient is added inside the function, in place.
        """
        wanted = [*results, *(gradient for _, gradient in additions)]
        given = {t.ref() for t in arguments}
        part = ancestors([t.op for t in wanted if t.ref() not in given] + list(side_effects), given)
        graph_def = self._graph_def(part)
        consumed = {name if ":" in name else f"{name}:0" for node in graph_def.node for name in node.input}

        @tf.function(input_signature=[tf.TensorSpec(t.shape, t.dtype) for t in arguments], autograph=False)
        def piece(*values: tf.Tensor) -> list[tf.Tensor]:
            known = {t.name: value for t, value in zip(arguments, values, strict=True)}
            graph = tf.compat.v1.get_default_graph()
            variables = {name: graph.capture(outer) for name, outer in self.captured.items() if name in consumed}
            computed = [t.name for t in wanted if t.name not in known]
            imported = tf.graph_util.import_graph_def(
                graph_def,
                {name: value for name, value in (known | variables).items() if name in consumed},
                computed,
                name="",
            )
            known |= dict(zip(computed, imported, strict=True))
            for accumulator, gradient in additions:
                accumulator.assign_add(known[gradient.name], read_value=False)
            return [known[t.name] for t in results]

        return piece.get_concrete_function()

    def _graph_def(self, part: set[tf.Operation]) -> Any:
        names = {op.name for op in part}
        graph_def = tf.compat.v1.GraphDef(library=self.graph_def.library, versions=self.graph_def.versions)
        for op in self.operations:
            if op in part and f"{op.name}:0" not in self.captured:
                node = graph_def.node.add()
                node.CopyFrom(self.nodes[op.name])
                node.attr.pop("_class", None)  # "same device as", possibly beyond the cut
                inputs = [name for name in node.input if not name.startswith("^") or name[1:] in names]
                del node.input[:]
                node.input.extend(inputs)
        return graph_def


def ancestors(operations: Iterable[tf.Operation], given: Iterable[Any] = ()) -> set[tf.Operation]:
    """`operations` and all that they need, not looking behind the `given` tensors (references)."""
    given, found, waiting = set(given), set(), list(operations)
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [t.op for t in op.inputs if t.ref() not in given]
    return found


def unique(tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    return list({t.ref(): t for t in tensors}.values())
