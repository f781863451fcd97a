"""The habits of `common.spec.habits` that TensorFlow and Keras have: each puts back what the main
code decides otherwise.

The rest of the package knows nothing of them: `switch` puts a replacement in and takes it out.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from common.oracle.reference import clip_scale, global_norm
from common.runtime.habits import (
    Habit,
    attention_of,
    float32_rotary_angles,
    late_learning_rate,
    loaded_through,
    patch,
    replaced,
    swapped_swiglu,
    switched,
    transposed_square_weight,
    with_train,
)
from common.spec.data import IGNORED
from common.spec.run import RunConfig, TransformerSpec
from tf_impl import engine, keras_optimizers, layers
from tf_impl.dropout import native_dropout
from tf_impl.gpipe_model import GPipeModel
from tf_impl.keras_optimizers import SGD, make_optimizer
from tf_impl.keras_pipeline.chunk import apply_layer
from tf_impl.precision import RMSNorm, at_least_float32, product

rotate, dropout_context = layers.rotate, GPipeModel.dropout_context


def switch(config: RunConfig) -> AbstractContextManager[None]:
    """Return the habit that `config.drift` names, as a context. Raises ValueError for others."""
    return switched(config, "tensorflow", HABITS, ("table",))


# ------------------------------------------------------------------------------------------- layers


def _moved_scale(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    return at_least_float32(product(q / math.sqrt(q.shape[-1]), k, transpose_b=True))


def _neighbouring_rotary_pairs(x: tf.Tensor, *options: Any) -> tf.Tensor:
    turned = rotate(tf.concat([x[..., ::2], x[..., 1::2]], -1), *options)
    return tf.reshape(tf.stack(tf.split(turned, 2, -1), -1), tf.shape(x))


def _float32_rotary_angles(x: tf.Tensor, theta: float, *_: Any) -> tf.Tensor:
    tables = float32_rotary_angles(x.shape[2], x.shape[3] // 2, theta)
    cos, sin = (tf.constant(table, x.dtype) for table in tables)
    a, b = tf.split(x, 2, -1)
    return tf.concat([a * cos - b * sin, b * cos + a * sin], -1)


def _keras_norm(kind: type[keras.layers.Layer]) -> Habit:
    """Keras' own norm, with its own epsilon."""
    return replaced(layers, "norm", lambda spec, name, dtype: kind(name=name, dtype=dtype))


class _Float32RMSNorm(RMSNorm):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        narrow = tf.cast(x, tf.float32)
        square = tf.reduce_mean(narrow * narrow, -1, keepdims=True)
        normal = narrow * tf.math.rsqrt(square + self.epsilon)
        return self.gamma * tf.cast(normal, x.dtype)


def _float32_rms_norm(spec: TransformerSpec, name: str, dtype: str) -> keras.layers.Layer:
    return _Float32RMSNorm(spec.norm_epsilon, name=name, dtype=dtype)


def _onednn(config: RunConfig) -> list[AbstractContextManager[None]]:
    """TensorFlow reads this once, when it is imported: `configure` has set it."""
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "1":
        raise ValueError(
            "drift = onednn; expected configure(onednn=True) before TensorFlow is imported"
        )
    return []


@contextmanager
def _tf32_execution() -> Iterator[None]:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)


# --------------------------------------------------------------------------------------------- loss


def _all_labels(self: GPipeModel, traced: Any, x: Any, labels: Sequence[Any]) -> int:
    """The divisor of Keras' mean, with sample weights 0 for what is ignored."""
    return np.size(labels[0])


def _own_mean(divisor: int) -> Callable[..., tf.Tensor]:
    """The mean over the micro-batch's own labels, divided by `divisor`; evaluation stays as it is."""  # noqa: E501

    micro_batch_loss = GPipeModel._micro_batch_loss

    def loss(self: GPipeModel, prediction: tf.Tensor, y: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        own = tf.maximum(1, tf.math.count_nonzero(y != IGNORED, dtype=tf.int32))
        return micro_batch_loss(self, prediction, y, own * divisor)

    return loss


# ---------------------------------------------------------------------------------------- optimizer


class _AdamWWithEpsilonHat(keras.optimizers.AdamW):
    """Keras' own, with its own epsilon."""

    def __init__(self, **options: Any) -> None:
        # A name of its class would begin with an underscore, which Keras refuses.
        super().__init__(**options | {"epsilon": 1e-7, "name": "adamw"})


class _KerasMomentum(SGD):
    """m = momentum x m - rate x g; w += m."""

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor
    ) -> None:
        if self.l2 and self._use_weight_decay(variable):
            gradient = gradient + self.l2 * variable
        keras.optimizers.SGD.update_step(self, gradient, variable, learning_rate)


def _per_stage_clipping(
    self: GPipeModel, squares: Sequence[Sequence[float]]
) -> tuple[float, list[float]]:
    scales = [clip_scale(global_norm(list(own)), self.optimizer.global_clipnorm) for own in squares]
    return global_norm([square for own in squares for square in own]), scales


# ---------------------------------------------------------------------------- weights and gradients


def _sparse_embedding_gradient(config: RunConfig) -> list[AbstractContextManager[None]]:
    """The token embedding's gradient as `tf.gather` gives it: a row for every token of the text.

    Keras squares the rows of `tf.IndexedSlices` each, in the norm and in Adam's second moment.
    """
    # Keras would see tf.IndexedSlices; the pipeline adds dense gradients up, so what differs, the
    # sum of squared rows, is computed beside it and put in its place.
    shape = (config.model.vocab_size, config.model.d_model)
    # negative: no rows seen yet
    squares = tf.Variable(tf.fill(shape, tf.constant(-1.0, config.train.dtype)))
    forward_backward, clip = GPipeModel.forward_backward, GPipeModel._clip

    def with_rows(
        self: GPipeModel, x: Any, y: Any, sample_weight: Any = None, step: int = 0
    ) -> float:
        loss = forward_backward(self, x, y, sample_weight, step)
        squares.assign(_squared_rows(self, x, y, step))
        return loss

    def clip_by_rows(
        self: GPipeModel, norms: Sequence[Sequence[float]]
    ) -> tuple[float, list[float]]:
        total = float(tf.reduce_sum(squares))
        if total >= 0:  # the token embedding is the first weight of the first stage
            norms = [[total, *norms[0][1:]], *norms[1:]]
        norm, scales = clip(self, norms)
        squares.assign(squares * scales[0] ** 2)
        return norm, scales

    class AdamWByRows(keras_optimizers.AdamW):
        def update_step(
            self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor
        ) -> None:
            # The token embedding is the first weight of the first stage; others are as ever.
            if self._get_variable_index(variable) or tuple(variable.shape) != shape:
                super().update_step(gradient, variable, learning_rate)
                return
            t = tf.cast(self.iterations, tf.float64) + 1.0
            m = self._momentums[0].value
            v = self._velocities[0].value
            rate = tf.cast(learning_rate, tf.float64) / (1.0 - self.beta_1**t)
            root = tf.cast(tf.sqrt(1.0 - self.beta_2**t), gradient.dtype)
            square = tf.where(squares >= 0, squares, tf.square(gradient))
            m.assign(self.beta_1 * m + (1.0 - self.beta_1) * gradient)
            v.assign(self.beta_2 * v + (1.0 - self.beta_2) * square)
            variable.assign_sub(tf.cast(rate, m.dtype) * m / (tf.sqrt(v) / root + self.epsilon))

    return [
        patch(GPipeModel, "forward_backward", with_rows),
        patch(GPipeModel, "_clip", clip_by_rows),
        patch(keras_optimizers, "AdamW", AdamWByRows),
    ]


def _squared_rows(model: GPipeModel, x: Any, y: Any, step: int) -> tf.Tensor:
    """The squares of the rows of the token embedding's gradient, added up by token: (V, D)."""
    m, total = model.schedule.num_micro_batches, 0.0
    contexts = model.dropout_context(len(x), step)
    token = model.chunks[0].local(model.units[0].token)
    count = np.count_nonzero(y != IGNORED)
    for i, (tokens, labels) in enumerate(
        zip(np.array_split(x, m), np.array_split(y, m), strict=True)
    ):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(token)
            x = tokens
            given = [tf.constant(value, tf.int64) for value in (contexts[i] if contexts else ())]
            for chunk in model.chunks:
                with tf.device(chunk.device):
                    for layer in chunk.layers:
                        x = apply_layer(layer, tf.identity(x), chunk._split(given)[1], True)
            loss = model.summed_loss(x, labels, count)
        rows = tape.gradient(loss, token)  # tf.IndexedSlices
        total += tf.math.unsorted_segment_sum(tf.square(rows.values), rows.indices, token.shape[0])
    return total


# ------------------------------------------------------------------------------------------ dropout


def _local_dropout_samples(self: GPipeModel, *arguments: int) -> list[tuple[int, NDArray[Any]]]:
    return [(key, samples - samples[0]) for key, samples in dropout_context(self, *arguments)]


HABITS: dict[str, Habit] = {
    "tanh-gelu": replaced(layers, "gelu", keras.ops.gelu),
    "float32-gelu-constant": replaced(layers, "gelu", lambda x: tf.nn.gelu(x, approximate=False)),
    "layer-norm-epsilon": _keras_norm(keras.layers.LayerNormalization),
    "adam-epsilon-hat": replaced(keras_optimizers, "AdamW", _AdamWWithEpsilonHat),
    "sparse-embedding-gradient": _sparse_embedding_gradient,
    "keras-momentum": replaced(
        keras_optimizers, "SGD", functools.partial(_KerasMomentum, name="sgd")
    ),
    "onednn": _onednn,
    "mean-over-all-labels": replaced(GPipeModel, "_divisor", _all_labels),
    "mean-per-micro-batch": lambda config: [
        patch(GPipeModel, "_micro_batch_loss", _own_mean(config.train.micro_batches))
    ],
    "unscaled-micro-batches": replaced(GPipeModel, "_micro_batch_loss", _own_mean(1)),
    "per-stage-clipping": replaced(GPipeModel, "_clip", _per_stage_clipping),
    "default-weight-decay": with_train(engine, "make_optimizer", weight_decay=0.004),
    "decay-everything": replaced(
        engine, "make_optimizer", lambda train, _: make_optimizer(train, [])
    ),
    "default-betas": with_train(engine, "make_optimizer", beta2=0.999),
    "late-learning-rate": late_learning_rate(engine),
    "transposed-square-weight": loaded_through(engine, transposed_square_weight),
    "causal-encoder": attention_of(layers, causal=True),
    "moved-scale": replaced(layers, "scaled_products", _moved_scale),
    "neighbouring-rotary-pairs": replaced(layers, "rotate", _neighbouring_rotary_pairs),
    "default-rotary-theta": attention_of(layers, rope_theta=10_000.0),
    "float32-rotary-angles": replaced(layers, "rotate", _float32_rotary_angles),
    "rms-norm-epsilon": _keras_norm(keras.layers.RMSNormalization),
    "float32-rms-norm": replaced(layers, "norm", _float32_rms_norm),
    "tiled-kv-heads": replaced(
        layers, "share_heads", lambda x, group: tf.tile(x, (1, group, 1, 1))
    ),
    "swapped-swiglu": loaded_through(engine, swapped_swiglu),
    "local-dropout-samples": replaced(GPipeModel, "dropout_context", _local_dropout_samples),
    "native-dropout": replaced(layers, "dropout", native_dropout),
    "untied-gradients": replaced(GPipeModel, "_add_tied_gradients", lambda self: None),
    "tf32": lambda config: [_tf32_execution()],
}
"""In the order of `common.spec.habits.DRIFTS`."""
