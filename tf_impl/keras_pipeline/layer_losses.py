"""What a layer adds to the loss, as a sum over micro-batches.

Keras sees one number: a mean over samples (activity regularizers), a sum over them, or a value of
the weights alone. A micro-batch's mean counts by its part of the mini-batch, and so do values that
are the same in every micro-batch; its sum counts whole. Which it is shows in the values for some
rows and for their two parts.
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
FIRST, REST = 3, 5
"""Rows of the two parts of the batch that a layer is tried with."""
OPEN_AXIS = 4
"""The length there of an axis that has none."""


def losses_of(layer: keras.layers.Layer) -> list[tf.Tensor]:
    """Return what the layer's last call adds to the loss, then its weight regularizers."""
    return [keras.ops.sum(loss) for loss in layer.losses]


def shared(losses: Sequence[tf.Tensor], kinds: Sequence[Kind], share: Any) -> list[tf.Tensor]:
    """`losses_of` a layer for a part of a mini-batch, its `share`, as parts of its loss."""
    regularizers = len(losses) - len(kinds)  # those of the weights: one value for all samples
    shares = [*(1 if kind == "sum" else share for kind in kinds), *[share] * regularizers]
    return [keras.ops.cast(s, loss.dtype) * loss for s, loss in zip(shares, losses, strict=True)]


def total(losses: Sequence[tf.Tensor]) -> tf.Tensor | None:
    """Their sum; None for none."""
    return functools.reduce(keras.ops.add, losses) if losses else None


def kinds_of_losses(
    layer: keras.layers.Layer, x: Any, call: Callable[..., Any]
) -> Mapping[bool, list[Kind]]:
    """By `training`: the kind of every loss that `call(x, training=...)` adds for inputs like `x`.

    In training, layers such as Dropout hide it; then it is what it is without training.
    """
    found = {t: _kinds(layer, x, functools.partial(call, training=t)) for t in (False, True)}
    if len(found[True]) == len(found[False]):
        pairs = zip(found[True], found[False], strict=True)
        found[True] = [other if kind == "neither" else kind for kind, other in pairs]
    return found


def _kinds(layer: keras.layers.Layer, like: Any, call: Callable[[Any], Any]) -> list[Kind]:
    generator, dtype = np.random.default_rng(0), tf.as_dtype(like.dtype)
    shape = (FIRST + REST, *(OPEN_AXIS if n is None else n for n in like.shape[1:]))
    low, high = (0.1, 0.9) if dtype.is_floating else (0, 2)  # valid for logarithms and for tokens
    numbers = generator.uniform(low, high, shape)
    mask = mask_of(like)
    if mask is not None:
        mask = tf.constant(generator.random(shape[: len(mask.shape)]) < 0.7)

    def values(rows: slice) -> np.ndarray:
        state = [(v, v.value) for v in layer.variables]
        with keras.StatelessScope(state, collect_losses=True, initialize_variables=False):
            x = tf.cast(numbers[rows], dtype)
            call(with_mask(x, None if mask is None else mask[rows]))
            found = [float(loss) for loss in losses_of(layer)]
        return np.array(found[: len(found) - num_regularized(layer)])

    try:
        whole, first, rest = map(values, (slice(None), slice(FIRST), slice(FIRST, None)))
    except Exception:  # a layer that takes no numbers, or no other number of rows
        return ["neither"]
    limit = 1e-3 if tf.as_dtype(layer.compute_dtype).size > 2 else 3e-2
    same = functools.partial(np.isclose, whole, rtol=limit, atol=0)
    mean = (FIRST * first + REST * rest) / (FIRST + REST)
    # A loss of the weights alone is both its mean and, where it is 0, its sum: the mean is right.
    pairs = zip(np.asarray(same(mean)), np.asarray(same(first + rest)), strict=True)
    return ["mean" if is_mean else "sum" if is_sum else "neither" for is_mean, is_sum in pairs]


def num_regularized(layer: keras.layers.Layer) -> int:
    """Return how many of the layer's losses come from its weights alone; they are the last."""
    return sum(v.regularizer is not None for v in layer.trainable_variables)
