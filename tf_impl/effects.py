"""Which operations may run again, and which change something, for a cut or a second forward.

TensorFlow calls an operation stateful as soon as it reads a variable, and so the loop of every
LSTM. What counts here is whether it, or any function that it calls, changes a state, draws a random
number, or calls Python.

    layer                   operations of its call      cut          again, by recomputation   m > 1
    ----------------------  --------------------------  -----------  ------------------------  -----------
    Dense                   ReadVariableOp, MatMul      free         free                      free
    LSTM                    While, whose body reads     free         free                      free
    Dropout                 AssignVariableOp (seed)     F            with the same seed        m draws
    BatchNormalization      AssignSubVariableOp         F            changes nothing           named
    tf.random.normal(...)   RandomStandardNormal        F            refused                   m draws
    tf.py_function          EagerPyFunc                 F            refused                   refused

"F" is where it runs, whoever needs its result. "Named": `compile` says that it is updated m times.

Differs: only a cut graph moves operations, so only TensorFlow has to ask.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework import op_def_registry, ops  # no public names

REPEATED = frozenset(
    {
        *(
            "ReadVariableOp",
            "VarHandleOp",
            "Placeholder",
            "Const",
            "ResourceGather",
            "ResourceGatherNd",
        ),
        *("VariableShape", "LookupTableFindV2", "LookupTableSizeV2", "Assert"),
    }
)
"""Stateful or not, these are repeated where they are needed, and two of them are as good as one."""


def custom_gradients(graph: Any) -> list[str]:
    """Return the names under which `tf.custom_gradient` has registered gradients for `graph`."""
    marked = [op for op in graph.get_operations() if op.type in ("Identity", "IdentityN")]
    names = [op.node_def.attr["_gradient_op_type"].s.decode() for op in marked]
    return [name for name in names if name]


def forget_gradients(names: Iterable[str]) -> None:
    """Drop these gradients: TensorFlow's registry would keep every graph that it has seen."""
    for name in names:
        ops.gradient_registry._registry.pop(name, None)


def mask_of(x: Any) -> tf.Tensor | None:
    """Return the mask that Keras has attached to a tensor."""
    return getattr(x, "_keras_mask", None)


def with_mask(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """`x` itself, with the mask attached as Keras does, if there is one."""
    if mask is not None:
        x._keras_mask = mask
    return x


def called_functions(node: Any) -> list[str]:
    """Return the functions that a node runs: a loop's body, branches, an inner `tf.function`."""
    # As attributes: While has two functions, Case a list of them. A node whose type is no known
    # operation is the call of the function of that name.
    given = [
        f.name for value in node.attr.values() for f in (value.func, *value.list.func) if f.name
    ]
    return given if op_def_registry.get(node.op) is not None else [node.op, *given]


def is_repeatable(node: Any, library: Mapping[str, Any], among: frozenset[str] = REPEATED) -> bool:
    """Return whether running a node again, or in another place, changes nothing.

    `library` has its graph's functions by name; only stateful operations in `among` are harmless.
    """
    called = called_functions(node)
    if called:  # the loop of an LSTM is stateful, since its body reads weights: look inside
        return all(
            is_repeatable(inner, library, among)
            for name in called
            for inner in library[name].node_def
        )
    return node.op in among or not op_def_registry.get(node.op).is_stateful


def all_nodes(node: Any, library: Mapping[str, Any]) -> list[Any]:
    """Return a node and those of all functions that it runs."""
    inner = [other for name in called_functions(node) for other in library[name].node_def]
    return [node, *(found for other in inner for found in all_nodes(other, library))]


@dataclass(frozen=True)
class Effects:
    """What a layer's call in training does besides computing its output."""

    changed: tuple[str, ...]
    """Where the variables are that it assigns (a layer's path); random seeds do not count."""
    is_undone: bool
    """Whether all of it is assignments to Keras variables that are not trained: a
    `keras.StatelessScope` holds these back. (SpectralNormalization assigns its kernel, too.)
    """
    differentiates_python: bool
    """Whether a `tf.py_function` computes what a gradient may be asked of."""
    mask: keras.KerasTensor | None
    """That of the output; Keras' symbolic call does not see those made inside a nested model."""


def effects_of(layer: keras.layers.Layer, x: Any, call: Callable[[Any], Any]) -> Effects | None:
    """Trace a layer's `call(x)` for a symbolic `x`; None if that fails without a batch size."""

    masks = []

    @tf.function(autograph=False)
    def traced(x: tf.Tensor, mask: tf.Tensor | None) -> None:
        masks.append(mask_of(call(with_mask(x, mask))))

    # The batch size stays open, as in Keras' own symbolic call.
    def spec(t: Any) -> Any:
        return None if t is None else tf.TensorSpec(t.shape, t.dtype)

    try:
        graph = traced.get_concrete_function(spec(x), spec(mask_of(x))).graph
    except Exception:  # the real trace, with a batch size, has the last word
        return None
    forget_gradients(custom_gradients(graph))
    graph_def = graph.as_graph_def()
    library = {function.signature.name: function for function in graph_def.library.function}
    found = [node for node in graph_def.node if not is_repeatable(node, library)]
    # By the name of the graph's input: the resource outside that it stands for.
    outer = {inner.op.name: outer for outer, inner in graph.captures}
    own = {id(handle): v for v in layer.variables for handle in handles(v)}
    weights = {id(v) for v in layer.weights}
    changed: dict[str, None] = {}
    is_undone = True
    for node in found:
        resources = [
            outer[name] for name in node.input if name in outer and outer[name].dtype == tf.resource
        ]
        variables = [own.get(id(resource)) for resource in resources]
        # AssignAddVariableOp(variable, value): the first input is what is assigned.
        target = variables[0] if node.op.startswith("Assign") and variables else None
        is_undone &= target is not None and not target.trainable
        assigned = variables if not node.op.startswith("Assign") else variables[:1]
        for v in assigned:
            if v is None:  # a plain tf.Variable, a table: not Keras' own
                changed[layer.name] = None
            elif id(v) in weights:
                changed[v.path.rsplit("/", 1)[0]] = None
    python = any(
        inner.op == "EagerPyFunc"
        and any(tf.as_dtype(t).is_floating for t in inner.attr["Tout"].list.type)
        for node in found
        for inner in all_nodes(node, library)
    )
    masks = [
        None if mask is None else keras.KerasTensor(mask.shape, mask.dtype.name) for mask in masks
    ]
    return Effects(tuple(changed), is_undone, python, masks[-1])


def handles(variable: keras.Variable) -> list[Any]:
    """Return the resources of a variable, one on every device that it is on."""
    return [
        part.handle
        for part in tf.distribute.get_strategy().experimental_local_results(variable.value)
    ]
