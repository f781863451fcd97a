"""Which operations of a trace belong to F, B and W, what crosses, and functions made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from tf_impl.cut_graphs.tensors import ancestors, source_of, unbundled, unique
from tf_impl.cut_graphs.trace import Trace
from tf_impl.effects import REPEATED, is_repeatable


class Scissors:
    """Sorts a trace's operations into F, B and W, and makes functions of them."""

    def __init__(self, trace: Trace, device: str | None = None) -> None:
        self.trace, self.device = trace, device
        self.operations = trace.graph.get_operations()
        # The same graph as a protocol buffer: what is cut out is made from copies of its nodes.
        self.graph_def = trace.graph.as_graph_def()
        self.nodes = {node.name: node for node in self.graph_def.node}
        # Variables are no inputs of a trace but tensors from outside that it has taken in.
        self.captured = {inner.name: outer for outer, inner in trace.graph.captures}
        self._sort()

    def _sort(self) -> None:
        trace = self.trace
        library = {f.signature.name: f for f in self.graph_def.library.function}
        self.repeatable = {
            op for op in self.operations if is_repeatable(self.nodes[op.name], library)
        }
        # Python's order of what has effects; an Assert has none on numbers, but must run too.
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
        # What reads a state is F's even where only B needs it: there it is another micro-batch's.
        outputs = [t.op for t in (trace.output, *trace.reported.values())]
        f = ancestors([*outputs, *self.forward_effects, *(self.changing & of_forward)])
        self.forward = f | {t.op for t in trace.inputs}
        w = ancestors([t.op for t in trace.weight_gradients])
        # What W alone needs of a second forward is B's too. In W it would cost more memory: the two
        # factors of SwiGLU would wait for it instead of their product.
        again = w & set(trace.again)
        b = ancestors([trace.input_gradient.op, *self.backward_effects, *again])
        self.backward_input = b - self.forward
        self.backward_weight = w - self.forward - self.backward_input

    def _dependent_on_data(self) -> set[tf.Operation]:
        """The operations whose results differ between micro-batches; all others may be repeated.

        Sets `changing`: those that change a state, and those that touch what is changed.
        """
        effects = set(self.operations) - self.repeatable
        changed = {t.ref() for op in effects for t in op.inputs if t.dtype == tf.resource}
        self.changing = {
            op
            for op in self.operations
            if op in effects or any(t.ref() in changed for t in op.inputs)
        }
        # From the data, and from what changes, forwards through all that reads it.
        waiting = [t.op for t in (*self.trace.inputs, *self.trace.output_gradient)]
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
        """Return the tensors that `source` computes and `users` (or the `results`) need.

        In the example of `tf_impl.cut_graphs`, crossing(W, B, ...) is dz and dy.
        """
        inputs = [source_of(t) for op in self.operations if op in users for t in op.inputs]
        return unique(t for t in [*inputs, *results] if t.op in source and t.op in self.dependent)

    def function(
        self,
        arguments: Sequence[tf.Tensor],
        results: Sequence[tf.Tensor],
        side_effects: Sequence[tf.Operation] = (),
        additions: Sequence[tuple[tf.Variable, tf.Tensor]] = (),
    ) -> Any:
        """Return the part of the graph from `arguments` to `results` as a concrete function.

        `additions` are (accumulator, gradient) pairs: the function adds the gradient, in place.
        """
        wanted = [*results, *(gradient for _, gradient in additions)]
        given = {t.ref() for t in arguments}
        part = ancestors([t.op for t in wanted if t.ref() not in given] + list(side_effects), given)
        graph_def = self._graph_def(part)
        # By name, as in a GraphDef: "op" is its first output.
        consumed = {n if ":" in n else f"{n}:0" for node in graph_def.node for n in node.input}

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
            # Weights come in as they came into the trace: read where they are, and not copied.
            variables = {
                name: graph.capture(outer)
                for name, outer in self.captured.items()
                if name in consumed
            }
            outside = {n: value for n, value in (known | variables).items() if n in consumed}
            computed = [t.name for t in wanted if t.name not in known]
            imported = tf.graph_util.import_graph_def(graph_def, outside, computed, name="")
            known |= dict(zip(computed, imported, strict=True))
            for accumulator, gradient in additions:
                with tf.device(accumulator.device):
                    value = tf.cast(known[gradient.name], accumulator.dtype)
                    accumulator.assign_add(value, read_value=False)
            return [known[t.name] for t in results]

        return piece.get_concrete_function()

    def forward_part(
        self, received: Sequence[tf.Tensor], wanted: Sequence[bool]
    ) -> tuple[Any, list[bool]]:
        """As `StageFunctions.forward_part`. Raises ValueError if the forward changes its state."""
        outputs = zip(self.trace.handed_on, wanted, strict=True)
        results = [t for t, is_wanted in outputs if is_wanted]
        part = ancestors(t.op for t in results)
        if part & self.changing:
            raise ValueError(
                "the mask of the predictions depends on a layer with a state or random numbers, so "
                "the labels that count are not known before the backward; expected a mask that is "
                "made before such layers"
            )
        given = [t for t in received if t.op in part]
        with tf.device(self.device):
            return self.function(given, results), [t.op in part for t in received]

    def _graph_def(self, part: set[tf.Operation]) -> Any:
        """The nodes of `part`, each with the inputs that are left after `unbundled`."""
        names = {op.name for op in part}
        graph_def = tf.compat.v1.GraphDef(versions=self.graph_def.versions)
        for op in self.operations:
            if op in part and f"{op.name}:0" not in self.captured:
                node = graph_def.node.add()
                node.CopyFrom(self.nodes[op.name])
                node.attr.pop("_class", None)  # "same device as", possibly beyond the cut
                # "^op": runs after it. What is beyond the cut has run in another function.
                controls = [n for n in node.input if n.startswith("^") and n[1:] in names]
                del node.input[:]
                node.input.extend([*(unbundled(t).name for t in op.inputs), *controls])
        return graph_def
