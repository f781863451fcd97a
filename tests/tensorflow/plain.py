"""The few operations of `tests.campaigns.batch_norm_model` in TensorFlow, with Keras' norms."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tests.campaigns.batch_norm_model import Arrays, Defaults, Loss, Norm, Tensor


class Ops:
    reshape = staticmethod(tf.reshape)
    transpose = staticmethod(tf.transpose)
    softmax = staticmethod(tf.nn.softmax)
    take = staticmethod(tf.gather)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return tf.constant(array)

    def array(self, tensor: Tensor) -> NDArray[Any]:
        return np.asarray(tf.convert_to_tensor(tensor))

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + tf.math.erf(x / math.sqrt(2)))  # tf.nn.gelu's constant has 12 digits

    def cross_entropy(self, logits: Tensor, targets: NDArray[Any]) -> Tensor:
        return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))

    def gradient(self, loss: Loss, weights: Arrays) -> tuple[float, Arrays]:
        held = {name: self.tensor(value) for name, value in weights.items()}
        with tf.GradientTape() as tape:
            tape.watch(held)
            value = loss(held)
        found = tape.gradient(value, held)
        return float(value), {name: self.array(each) for name, each in found.items()}

    def norm(self, kind: str, width: int, new_share: float, epsilon: float) -> Norm:
        plain = {"epsilon": epsilon, "center": False, "scale": False, "dtype": "float64"}
        if kind == "batch norm":
            layer = keras.layers.BatchNormalization(momentum=1 - new_share, **plain)
            return lambda x, training: layer(x, training=training)
        layer = keras.layers.LayerNormalization(**plain)
        return lambda x, training: layer(x)

    def defaults(self, x: NDArray[Any]) -> Defaults:
        layer = keras.layers.BatchNormalization(dtype="float64")
        layer(self.tensor(x), training=True)
        running = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
        return Defaults(layer.epsilon, layer.momentum, *running)
