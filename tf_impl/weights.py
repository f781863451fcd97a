"""Canonical names to Keras' variables, one by one, and NumPy arrays in and out of them.

Keras stores Dense kernels as (in, out) and embeddings as (vocabulary, width): as canonical.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from common.spec.parameters import TOKEN_EMBEDDING
from common.spec.shards import ROWS, axis_of, joined, shard_of
from tf_impl.device_shards import Shards, parts_of
from tf_impl.layers import Block, Embedding, Head, Unit


class NamedParameter(NamedTuple):
    """A parameter and its canonical name, which the shards of one have in common."""

    name: str
    parameter: keras.Variable
    is_copy: bool = False
    """A tied head's copy of the token embedding; the embedding's own comes first in the model."""


def named_parameters(
    part: Sequence[str], units: Sequence[Unit], tied_head: bool
) -> list[NamedParameter]:
    """Return every parameter of `units`, whose names are `part`, in canonical order; shards of one
    follow each other.

    Raises ValueError for one that has no canonical name.
    """
    named: list[NamedParameter] = []
    for name, unit in zip(part, units, strict=True):
        match unit:  # in the order of `common.spec.parameters.parameter_shapes`
            case Embedding():
                named += [NamedParameter(TOKEN_EMBEDDING, own.token) for own in parts_of(unit)]
                if unit.position is not None:
                    named.append(NamedParameter("embedding.position.weight", unit.position))
            case Block():
                named += _block_parameters(name, unit)
            case Head():
                named += _norm_parameters("head.norm", unit.norm)
                if tied_head:
                    copies = [own.token for own in parts_of(unit)]
                    named += [
                        NamedParameter(TOKEN_EMBEDDING, copy, is_copy=True) for copy in copies
                    ]
                else:
                    named += _linear_parameters("head.output", unit, "projection")
    _check_all_are_named(part, units, named)
    return named


def _norm_parameters(name: str, norm: keras.layers.Layer | None) -> list[NamedParameter]:
    """Those of any norm, by Keras' names; none where there is no norm."""
    # LayerNormalization has a gamma, RMSNormalization a scale.
    names = {"gamma": "weight", "scale": "weight", "beta": "bias"}
    variables = [] if norm is None else norm.trainable_variables
    return [NamedParameter(f"{name}.{names.get(own.name, own.name)}", own) for own in variables]


def _linear_parameters(
    name: str, whole: keras.layers.Layer, attribute: str
) -> list[NamedParameter]:
    """Those of a linear layer of `whole` or of its shards, with or without bias; or of none."""
    layers: list[Any] = [getattr(own, attribute) for own in parts_of(whole)]
    if layers[0] is None:
        return []
    biases = [layer.bias for layer in layers]
    if isinstance(whole, Shards) and name.split(".")[-1] in ROWS:
        biases = [whole.bias]
    named = [NamedParameter(f"{name}.weight", layer.kernel) for layer in layers]
    return named + [NamedParameter(f"{name}.bias", own) for own in biases if own is not None]


def _block_parameters(name: str, block: Block) -> list[NamedParameter]:
    attention, feed_forward = block.attention, block.feed_forward
    return [
        *_norm_parameters(f"{name}.norm_1", block.norm_1),
        *_linear_parameters(f"{name}.attention.query", attention, "query"),
        *_linear_parameters(f"{name}.attention.key", attention, "key"),
        *_linear_parameters(f"{name}.attention.value", attention, "value"),
        *_linear_parameters(f"{name}.attention.output", attention, "projection"),
        *_norm_parameters(f"{name}.norm_2", block.norm_2),
        *_linear_parameters(f"{name}.feed_forward.gate", feed_forward, "gate"),
        *_linear_parameters(f"{name}.feed_forward.up", feed_forward, "up"),
        *_linear_parameters(f"{name}.feed_forward.down", feed_forward, "down"),
    ]


def _check_all_are_named(
    part: Sequence[str], units: Sequence[Unit], named: Sequence[NamedParameter]
) -> None:
    """A parameter without a name would be neither loaded nor saved, and nobody would see it."""
    known = {id(item.parameter) for item in named}
    for name, unit in zip(part, units, strict=True):
        for own, parameter in ((variable.path, variable) for variable in unit.trainable_variables):
            if id(parameter) not in known:
                raise ValueError(
                    f"{own} of {name} has no canonical name; expected one in tf_impl/weights.py"
                )


# Differs: a Keras variable has no gradient attribute, so the caller says where it is.
_GradientOf = Callable[[keras.Variable], tf.Variable]


def load_weights(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy canonical arrays into the parameters. Raises KeyError, and ValueError for a shape."""
    load_gradients(named, arrays, lambda parameter: parameter)


def load_gradients(
    named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]], gradient_of: _GradientOf
) -> None:
    """Copy canonical arrays into the parameters' gradients. Raises as `load_weights`."""
    for own in _shards_of(named):
        for k, item in enumerate(own):
            axis = axis_of(item.name) if len(own) > 1 else None
            gradient_of(item.parameter).assign(shard_of(arrays[item.name], axis, k, len(own)))


def export_weights(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the weights as canonical arrays of their own memory."""
    return export_gradients(named, lambda parameter: parameter)


def export_gradients(
    named: Iterable[NamedParameter], gradient_of: _GradientOf
) -> dict[str, NDArray[Any]]:
    """Return the gradients as canonical arrays of their own memory."""
    arrays = {}
    for own in _shards_of(named):
        name, axis = own[0].name, axis_of(own[0].name) if len(own) > 1 else None
        pieces = [np.array(gradient_of(item.parameter).numpy()) for item in own]
        arrays[name] = pieces[0] if axis is None else joined(pieces, axis)
    return arrays


def _shards_of(named: Iterable[NamedParameter]) -> list[list[NamedParameter]]:
    """Those of each parameter; a list of one where it is whole."""
    groups = itertools.groupby(named, lambda item: (item.name, item.is_copy))
    return [list(own) for _, own in groups]


def to_array(tensor: tf.Tensor) -> NDArray[Any]:
    """`tensor` in NumPy; bfloat16, which NumPy lacks, as float32."""
    array: NDArray[Any] = (
        tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor
    ).numpy()
    return array
