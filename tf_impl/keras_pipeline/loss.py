"""A Keras loss of a mini-batch as a sum over its micro-batches.

Keras computes a value per element, multiplies by weights and masks, and divides the sum by a count
(`Loss.__call__`). The sum is additive and the count too, so with the count of the whole mini-batch,

    loss(mini-batch) = sum over micro-batches of numerator(micro-batch) / divisor(mini-batch)

is Keras' own number: never a mean of means. The numerator comes from Keras' own `__call__`, of a
copy of the loss that sums. Labels of another rank, integer or boolean ones, masks and
`ignore_class` are therefore Keras' affair.

A loss that reduces by itself (a function that returns a scalar, a subclass with a `__call__` of its
own) hides its count. It is tried on three rows: a mean over samples and a sum are known by their
values; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank  # without public names

from tf_impl.effects import mask_of
from tf_impl.keras_pipeline.keras_copy import shallow_copy

COUPLED = (keras.losses.Dice, keras.losses.Tversky)
"""Keras' own losses that return a scalar, unless they are told which axes to sum over."""


class BatchLoss(NamedTuple):
    """What `keras.Model.compile` was given, for one shape of labels."""

    loss: keras.losses.Loss
    weight: float
    """Keras' `loss_weights`."""
    reduces: Literal["no", "mean", "sum"]
    """What `loss` does by itself, out of sight of `reduction`."""

    def numerator(
        self, y: tf.Tensor, prediction: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Of a part of the mini-batch: a scalar. Raises as `divisor`."""
        loss = self.loss
        if self.reduces == "no":
            # With "sum", Keras multiplies by weights and masks and does not divide.
            loss = shallow_copy(loss, reduction="sum")
            if sample_weight is not None:
                self._counted(y, prediction, sample_weight)
        total = loss(y, prediction, sample_weight)
        if self.reduces == "mean":  # of b samples: b times that is their sum
            total *= prediction.shape[0]
        return total if self.weight == 1 else total * self.weight

    def divisor(
        self, y: tf.Tensor, prediction: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Of the whole mini-batch: a scalar in float64. Reads no more of `prediction` than its
        shape and mask.

        Raises ValueError for a sample weight that Keras could not apply to the loss.
        """
        if self.reduces != "no":
            if mask_of(prediction) is not None:
                raise ValueError(
                    "a loss that reduces by itself cannot be masked; expected one value per element"
                )
            return tf.constant(
                float(prediction.shape[0]) if self.reduces == "mean" else 1.0, tf.float64
            )
        values, mask, weight = self._counted(y, prediction, sample_weight)
        if self.loss.reduction == "sum":
            return tf.ones((), tf.float64)
        if self.loss.reduction == "mean_with_sample_weight" and weight is not None:
            return tf.reduce_sum(tf.cast(weight, tf.float64))
        size = float(values.shape.num_elements())
        if mask is None:
            return tf.constant(size, tf.float64)
        # Keras divides by how many elements of the mask count, and how many values each stands for.
        return tf.reduce_sum(tf.cast(mask, tf.float64)) * (size / mask.shape.num_elements())

    def _counted(
        self, y: tf.Tensor, prediction: tf.Tensor, sample_weight: tf.Tensor | None
    ) -> tuple[Any, Any, Any]:
        """The values, the mask, and the weight with the mask in it, as `Loss.__call__` has them."""
        dtype = self.loss.dtype
        values = self.loss.call(
            keras.ops.convert_to_tensor(y, dtype), keras.ops.convert_to_tensor(prediction, dtype)
        )
        if sample_weight is not None:
            fitted = squeeze_or_expand_to_same_rank(
                values, keras.ops.convert_to_tensor(sample_weight, dtype)
            )
            if len(fitted[0].shape) != len(fitted[1].shape):
                raise ValueError(
                    f"sample_weight of shape {tuple(sample_weight.shape)} for a loss of shape "
                    f"{tuple(values.shape)}; expected a weight for every value, or 1 in place of "
                    "an axis"
                )
        # Keras puts the mask into the weight, so that a masked value counts for nothing.
        masks = [mask for mask in (mask_of(prediction), mask_of(values)) if mask is not None]
        mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
        weight = apply_mask(sample_weight, mask, dtype, "sum")
        return values, mask, weight


@keras.saving.register_keras_serializable("triptych")
class NoLoss(keras.losses.Loss):
    """Stands for `compile(loss=None)`, where the layers alone add to the loss: 0 for every
    prediction, with a gradient of 0.
    """

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return keras.ops.sum(0 * y_pred, axis=-1)


def check_loss(loss: Any) -> None:
    """Raises ValueError for what is known to be wrong before a label is seen."""
    if loss is None:
        return
    if isinstance(loss, dict):
        raise ValueError(
            "loss is a dict; expected the loss itself, since a row of layers has one output"
        )
    parts = [part for part in keras.tree.flatten(loss) if part is not None]
    if len(parts) != 1:
        raise ValueError(f"compile has {len(parts)} losses; expected one, for example loss='mse'")
    found = (
        parts[0] if str(parts[0]).lower() in ("crossentropy", "ce") else keras.losses.get(parts[0])
    )
    if isinstance(found, keras.losses.Loss) and found.reduction in (None, "none"):
        raise ValueError(
            f"loss reduction {found.reduction!r} gives no number to report; expected sum, "
            "sum_over_batch_size, mean or mean_with_sample_weight"
        )
    if getattr(found, "fn", found) is keras.losses.circle or isinstance(found, keras.losses.Circle):
        raise ValueError(
            "the circle loss compares the samples of a batch with each other; expected one value "
            "per sample"
        )


def batch_loss(
    compiled: Any,
    y: tf.Tensor,
    prediction: tf.TensorSpec,
    sample_weight: tf.Tensor | None,
    pieces: int,
) -> BatchLoss:
    """Find out how the loss of a `keras.Model` (its `_compile_loss`) goes over micro-batches.

    Raises ValueError for a loss that is not the sum over its parts, where there is more than one.
    """
    if not compiled.built:
        # "crossentropy" is one of three losses, depending on the shapes
        compiled.build(y, prediction)
    found = compiled._flat_losses[0]
    loss, weight = found.loss, 1.0 if found.loss_weights is None else float(found.loss_weights)
    if pieces == 1:  # the micro-batch is the mini-batch: any loss is right
        return BatchLoss(loss, weight, "no" if _has_values(loss) else "sum")
    if _has_values(loss) and not isinstance(loss, COUPLED) and _is_keras(getattr(loss, "fn", None)):
        return BatchLoss(loss, weight, "no")
    return BatchLoss(loss, weight, _tried(loss, y[:3], prediction, sample_weight))


def _has_values(loss: keras.losses.Loss) -> bool:
    """Whether Keras does the reduction."""
    return type(loss).__call__ is keras.losses.Loss.__call__


def _is_keras(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("keras.src.losses")


def _tried(
    loss: keras.losses.Loss,
    y: tf.Tensor,
    prediction: tf.TensorSpec,
    sample_weight: tf.Tensor | None,
) -> Literal["no", "mean", "sum"]:
    """How `loss` reduces, from its values for some rows and for their two parts."""
    generator, n = np.random.default_rng(0), len(y)

    def random(shape: Sequence[int], dtype: Any) -> tf.Tensor:
        return tf.cast(generator.uniform(0.1, 0.9, (n, *shape[1:])), dtype)

    guess = random(prediction.shape, prediction.dtype)  # probabilities, to be valid for every loss
    weight = None if sample_weight is None else random(sample_weight.shape, sample_weight.dtype)

    def values(of: keras.losses.Loss) -> tuple[float, float, float]:
        """For all rows, for the first, and for the others."""
        parts = [slice(0, n), slice(0, 1), slice(1, n)]
        whole, first, others = (
            float(of(y[p], guess[p], None if weight is None else weight[p])) for p in parts
        )
        return whole, first, others

    def same(a: float, b: float) -> bool:
        return bool(np.isclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True))

    if n > 1:  # of one sample, a mean and a sum are the same
        if _has_values(loss) and len(
            loss.call(keras.ops.cast(y, loss.dtype), keras.ops.cast(guess, loss.dtype)).shape
        ):
            whole, first, rest = values(shallow_copy(loss, reduction="sum"))
            if same(whole, first + rest):
                return "no"
        whole, first, rest = values(loss)
        if same(whole, (first + (n - 1) * rest) / n):
            return "mean"
        if same(whole, first + rest):
            return "sum"
    raise ValueError(
        f"the loss {getattr(loss, 'name', loss)} of a batch is neither the sum nor the mean of its "
        "samples' losses, so it cannot be computed in micro-batches; expected one value per "
        "sample, or num_micro_batches=1"
    )
