"""What Keras hands to a step, as tensors, and these cut into micro-batches."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def piece_sizes(batch_size: int, pieces: int) -> list[int]:
    """As `numpy.array_split` cuts: sizes that differ by at most one, the larger ones first."""
    size, larger = divmod(batch_size, pieces)
    return [size + 1] * larger + [size] * (pieces - larger)


def one_tensor(value: Any, what: str) -> tf.Tensor:
    """`value` without Keras' wrapping. Raises ValueError for none, several, or no array at all."""
    # Keras wraps in lists, tuples and dicts; `sample_weight` may be a list that holds None.
    leaves = [leaf for leaf in keras.tree.flatten(value) if leaf is not None]
    if len(leaves) != 1:
        raise ValueError(
            f"{what} has {len(leaves)} arrays; expected one, since a row of layers has one input "
            "and output"
        )
    if isinstance(leaves[0], tf.SparseTensor | tf.RaggedTensor):
        raise ValueError(f"{what} is a {type(leaves[0]).__name__}; expected a dense tensor")
    tensor = tf.convert_to_tensor(leaves[0])
    if not tensor.shape.rank:
        raise ValueError(
            f"{what} is a single number; expected an array with a row for every sample"
        )
    return tensor


def unpacked(data: Any, needs_labels: bool = True) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """(x, y, sample_weight) of a step, row by row; labels not needed are 0. Raises ValueError."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    x = one_tensor(x, "x")
    if y is None and needs_labels:
        raise ValueError("the data has no labels; expected (x, y) or (x, y, sample_weight)")
    y = tf.zeros(len(x)) if y is None else one_tensor(y, "y")
    weight = None if weight is None else one_tensor(weight, "sample_weight")
    rows = [len(tensor) for tensor in (x, y, weight) if tensor is not None]
    if len(set(rows)) > 1:
        raise ValueError(f"x, y and sample_weight have {rows} rows; expected as many of each")
    return x, y, weight
