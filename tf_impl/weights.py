"""Canonical names to Keras' variables, one by one, and NumPy arrays in and out of them.

Keras stores Dense kernels as the canonical (in, out) and embeddings as (vocabulary, width): nothing
is transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from common.spec.parameters import TOKEN_EMBEDDING
from tf_impl.layers import Block, Embedding, Head, Unit


class NamedParameter(NamedTuple):
    """A parameter and its canonical name."""

    name: str
    parameter: keras.Variable
    is_copy: bool = False
    """A tied head's copy of the token embedding; the embedding's own comes first in the model."""


def named_parameters(
    part: Sequence[str], units: Sequence[Unit], tied_head: bool
) -> list[NamedParameter]:
    """Return every parameter of `units`, whose names are `part`, in canonical order."""
    named: list[NamedParameter] = []
    for name, unit in zip(part, units, strict=True):
        match unit:
            case Embedding():
                named += [
                    NamedParameter(TOKEN_EMBEDDING, unit.token),
                    NamedParameter("embedding.position.weight", unit.position),
                ]
            case Block():
                named += _block_parameters(name, unit)
            case Head():
                if unit.norm is not None:
                    named += [
                        NamedParameter("head.norm.weight", unit.norm.gamma),
                        NamedParameter("head.norm.bias", unit.norm.beta),
                    ]
                if tied_head:
                    named.append(NamedParameter(TOKEN_EMBEDDING, unit.token, is_copy=True))
                else:
                    named.append(NamedParameter("head.output.weight", unit.projection.kernel))
    return named


def _block_parameters(name: str, block: Block) -> list[NamedParameter]:
    attention, feed_forward = block.attention, block.feed_forward
    return [
        NamedParameter(f"{name}.norm_1.weight", block.norm_1.gamma),
        NamedParameter(f"{name}.norm_1.bias", block.norm_1.beta),
        NamedParameter(f"{name}.attention.query.weight", attention.query.kernel),
        NamedParameter(f"{name}.attention.query.bias", attention.query.bias),
        NamedParameter(f"{name}.attention.key.weight", attention.key.kernel),
        NamedParameter(f"{name}.attention.value.weight", attention.value.kernel),
        NamedParameter(f"{name}.attention.value.bias", attention.value.bias),
        NamedParameter(f"{name}.attention.output.weight", attention.projection.kernel),
        NamedParameter(f"{name}.attention.output.bias", attention.projection.bias),
        NamedParameter(f"{name}.norm_2.weight", block.norm_2.gamma),
        NamedParameter(f"{name}.norm_2.bias", block.norm_2.beta),
        NamedParameter(f"{name}.feed_forward.up.weight", feed_forward.up.kernel),
        NamedParameter(f"{name}.feed_forward.up.bias", feed_forward.up.bias),
        NamedParameter(f"{name}.feed_forward.down.weight", feed_forward.down.kernel),
        NamedParameter(f"{name}.feed_forward.down.bias", feed_forward.down.bias),
    ]


# Differs: a Keras variable has no gradient attribute, so the caller says where the gradient of a
# parameter is.
GradientOf = Callable[[keras.Variable], tf.Variable]


def load_weights(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy canonical arrays into the parameters. Raises KeyError for a missing one, ValueError for
    a wrong shape.
    """
    for item in named:
        item.parameter.assign(arrays[item.name])


def load_gradients(
    named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]], gradient_of: GradientOf
) -> None:
    """Copy canonical arrays into the parameters' gradients. Raises as `load_weights`."""
    for item in named:
        gradient_of(item.parameter).assign(arrays[item.name])


def to_array(tensor: tf.Tensor) -> NDArray[Any]:
    """`tensor` in NumPy; bfloat16, which NumPy lacks, as float32."""
    array: NDArray[Any] = (
        tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor
    ).numpy()
    return array


def export_weights(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the weights as canonical arrays of their own memory."""
    return {item.name: np.array(item.parameter.numpy()) for item in named}


def export_gradients(
    named: Iterable[NamedParameter], gradient_of: GradientOf
) -> dict[str, NDArray[Any]]:
    """Return the gradients as canonical arrays of their own memory."""
    return {item.name: np.array(gradient_of(item.parameter).numpy()) for item in named}
