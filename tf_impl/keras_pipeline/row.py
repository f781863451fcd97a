"""A row of Keras layers: what may be in it, and where it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import keras

from common.spec.partition import even_boundaries
from common.spec.run import TransformerSpec


class Row(NamedTuple):
    """The layers of a model, and what its input is like, where one of them says so."""

    layers: list[keras.layers.Layer]
    input: keras.KerasTensor | None


def row_of(given: Sequence[Any]) -> Row:
    """`given` without its `keras.Input` or `InputLayer`. Raises ValueError for what is no row."""
    if not isinstance(given, Iterable):
        raise ValueError(f"layers is a {type(given).__name__}; expected a list of Keras layers")
    # `keras.Input` gives a tensor, whose history is the InputLayer that made it.
    layers = [
        entry._keras_history.operation if isinstance(entry, keras.KerasTensor) else entry
        for entry in given
    ]
    start = None
    if layers and isinstance(layers[0], keras.layers.InputLayer):
        start = layers.pop(0).output
    # Dense(10, input_shape=(5,)), as older code has it.
    elif layers and getattr(layers[0], "_input_shape_arg", None) is not None:
        start = keras.Input(layers[0]._input_shape_arg, dtype=layers[0].compute_dtype)
    if not layers:
        raise ValueError("no layer; expected a list of Keras layers")
    for i, layer in enumerate(layers):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"layer {i} is a {type(layer).__name__}; expected a Keras layer")
        if isinstance(layer, keras.layers.InputLayer):
            raise ValueError(
                f"layer {i} ({layer.name}) is an input; expected one only, ahead of all layers"
            )
        if layer._inbound_nodes:
            raise ValueError(
                f"layer {i} ({layer.name}) is part of another model, whose functions would go on "
                "with its old weights; expected a new layer"
            )
        if any(layer is other for other in layers[:i]):
            raise ValueError(f"layer {i} ({layer.name}) comes twice; expected two layers")
        if any(getattr(inner, "stateful", False) for inner in layer._flatten_layers()):
            raise ValueError(
                f"layer {i} ({layer.name}) is stateful, so a micro-batch would begin where other "
                "samples ended; expected stateful=False"
            )
        if any(layer.name == other.name for other in layers[:i]):
            raise ValueError(
                f"two layers are called {layer.name!r}; expected names that differ, as "
                "Sequential does"
            )
    return Row(layers, start)


def check_numbers(**given: Any) -> None:
    """Raises ValueError for what is no whole number, by its name."""
    for name, value in given.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} = {value!r}; expected a whole number")


def cut_row(
    spec: TransformerSpec | None,
    num_layers: int,
    stages: int,
    chunks: int,
    partition: str | Sequence[int],
) -> list[int]:
    """Return each virtual stage's first layer, and the number of layers. Raises ValueError."""
    parts = stages * chunks
    if parts > num_layers:
        raise ValueError(
            f"{parts} virtual stages for {num_layers} layers; expected at most {num_layers}"
        )
    if isinstance(partition, str):
        if partition != "even":
            raise ValueError(
                f"partition {partition!r}; expected 'even' or boundaries such as [2, 5]"
            )
        spread = [k * num_layers // parts for k in range(1, parts)]
        # The Transformer's blocks are spread, with the embedding and the head at the ends.
        inner = even_boundaries(spec.num_layers, stages, chunks) if spec else spread
    else:
        inner = list(partition) if isinstance(partition, Iterable) else [partition]
        check_numbers(**{f"partition[{k}]": edge for k, edge in enumerate(inner)})
    edges = [0, *inner, num_layers]
    if len(inner) != parts - 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"partition {inner} needs {parts - 1} increasing boundaries between 1 and "
            f"{num_layers - 1}"
        )
    return edges
