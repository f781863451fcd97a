"""What a layer adds to the loss, as a sum over micro-batches.

Keras sees one number: a mean over samples (activity regularizers), a sum over them, or a value of the weights alone. A
micro-batch's mean counts by its part of the mini-batch, and so do values that are the same in every micro-batch; its sum
counts whole. Which it is shows in the values for some rows and for their two parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tf_impl.effects import mask_of, with_mask

Kind = Literal["mean", "sum", "neither"]
ROWS, FIRST, OPEN_AXIS = 8, 3, 4
"""Rows to try a layer with, those of them in the first part, and the length of an axis that has none."""


def losses_of(layer: keras.layers.Layer) -> list[tf.Tensor]:
    """What the layer's last call adds to the loss, then its weight regularizers, each as one number."""
    return [keras.ops.sum(loss) for loss in layer.losses]


def shared(losses: Sequence[tf.Tensor], kinds: Sequence[Kind], share: Any) -> list[tf.Tensor]:
    """`losses_of` a layer for a part of a mini-batch, as parts of its loss. `share`: that part's share of the samples."""
    is_sum = [kind == "sum" for kind in kinds] + [False] * (len(losses) - len(kinds))
    return [loss if s else keras.ops.cast(share, loss.dtype) * loss for loss, s in zip(losses, is_sum, strict=True)]


def total(losses: Sequence[tf.Tensor]) -> tf.Tensor | None:
    """Their sum; None for none."""
    return functools.reduce(keras.ops.add, losses) if losses else None


def kinds_of_losses(layer: keras.layers.Layer, x: Any, call: Callable[..., Any]) -> Mapping[bool, list[Kind]]:
    """By `training`: the kind of every loss that `call(x, training=...)` adds for inputs like `x`.

    In training, layers such as Dropout hide it; then it is what it is without training.
    """
    found = {training: _kinds(layer, x, functools.partial(call, training=training)) for training in (False, True)}
    if len(found[True]) == len(found[False]):
        pairs = zip(found[True], found[False], strict=True)
        found[True] = [other if kind == "neither" else kind for kind, other in pairs]
    return found


def _kinds(layer: keras.layers.Layer, like: Any, call: Callable[[Any], Any]) -> list[Kind]:
    generator = np.random.default_rng(0)
    shape = (ROWS, *(OPEN_AXIS if n is None else n for n in like.shape[1:]))
    dtype = tf.as_dtype(like.dtype)
    # Positive, to be valid for every loss.
    numbers = generator.uniform(0.1, 0.9, shape) if dtype.is_floating else generator.integers(0, 2, shape)
    mask = None if mask_of(like) is None else tf.constant(generator.random(shape[: len(mask_of(like).shape)]) < 0.7)

    def values(rows: slice) -> np.ndarray:
        state = [(v, v.value) for v in layer.variables]
        with keras.StatelessScope(state, collect_losses=True, initialize_variables=False):
            call(with_mask(tf.cast(numbers[rows], dtype), None if mask is None else mask[rows]))
            regularized = sum(v.regularizer is not None for v in layer.trainable_variables)
            found = losses_of(layer)
            return np.array([float(loss) for loss in found[: len(found) - regularized]])

    try:
        whole, first, rest = (values(rows) for rows in (slice(ROWS), slice(FIRST), slice(FIRST, ROWS)))
    except Exception:  # a layer that takes no numbers, or no other number of rows
        return ["neither"]
    limit = 1e-3 if tf.as_dtype(layer.compute_dtype).size > 2 else 3e-2
    same = functools.partial(np.isclose, whole, rtol=limit, atol=0)
    is_mean, is_sum = same((FIRST * first + (ROWS - FIRST) * rest) / ROWS), same(first + rest)
    return ["mean" if m else "sum" if s else "neither" for m, s in zip(is_mean, is_sum, strict=True)]
