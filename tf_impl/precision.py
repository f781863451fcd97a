"""bfloat16 as other frameworks' kernels have it: operands and results, with float32 between.

Differs: PyTorch's kernels do so themselves. TensorFlow 2.21 on CPU

- rounds matrix products toward zero (`FloatToBFloat16` in tensorflow/core/framework/bfloat16.cc keeps the upper half of
  the float32), so each is too small by 0.7 roundoffs: errors of one sign, which layers and steps
  add up;
- sums over rows in bfloat16, as for the gradient of a bias: 10 roundoffs off after 768 rows;
- rounds after every operation that GELU consists of, and Python's numbers too: 1 / 0.9 becomes 1.109.

`tests/tensorflow/test_bfloat16.py` measures these; docs/numerics.md says what they did to a loss
curve.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf


def at_least_float32(x: tf.Tensor) -> tf.Tensor:
    """`x`, in float32 if it is bfloat16."""
    return tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x


def product(a: tf.Tensor, b: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """`tf.matmul`, rounded to the nearest."""
    if a.dtype != tf.bfloat16 or products_are_rounded():
        return tf.matmul(a, b, transpose_b=transpose_b)
    return tf.cast(
        tf.matmul(at_least_float32(a), at_least_float32(b), transpose_b=transpose_b), a.dtype
    )


@functools.cache
def products_are_rounded() -> bool:
    """Return whether bfloat16 products round to the nearest here, as GPUs and oneDNN do."""
    size = 64
    with tf.init_scope():  # also while a function is traced
        # 1.7637 lies 3/4 up between two bfloat16 numbers
        a, b = (tf.fill((size, size), 1.0078125), 1.75 * tf.eye(size))
        found = tf.matmul(tf.cast(a, tf.bfloat16), tf.cast(b, tf.bfloat16))
        return bool(tf.reduce_all(tf.cast(found, tf.float32) == 1.765625))


def softmax(scores: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`tf.nn.softmax` over float32 `scores`' last axis, rounded to `dtype`; it holds that alone.

    Differs: PyTorch's softmax in bfloat16 is so already.
    """

    @tf.custom_gradient
    def rounded(scores: tf.Tensor) -> Any:
        weights = tf.cast(tf.nn.softmax(scores), dtype)

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            y, dy = at_least_float32(weights), at_least_float32(dy)
            return (dy - tf.reduce_sum(dy * y, -1, keepdims=True)) * y

        return weights, gradient

    return tf.nn.softmax(scores) if scores.dtype == dtype else rounded(scores)


class Linear(keras.layers.Dense):
    """`keras.layers.Dense` with the products of this module, and a bias' gradient in float32.

    Differs: PyTorch's linear layer is so already, and it is its LayerNorm that is not
    (`torch_impl.precision`).
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        # (B S, in): the kernel's gradient is then one product
        rows = tf.reshape(inputs, (-1, inputs.shape[-1]))
        y = tf.reshape(product(rows, self.kernel), (-1, *inputs.shape[1:-1], self.units))
        if self.bias is None:
            return y
        return tf.cast(at_least_float32(y) + at_least_float32(self.bias), y.dtype)


class RMSNorm(keras.layers.Layer):
    """x / sqrt(mean(x^2) + epsilon) * gamma (Zhang and Sennrich 2019), in float32 at least.

    Differs: written out, since `keras.layers.RMSNormalization` takes rsqrt.
    """

    def __init__(self, epsilon: float, **options: Any) -> None:
        super().__init__(**options)
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.gamma = self.add_weight(shape=input_shape[-1:], initializer="ones", name="gamma")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        wide, gamma = at_least_float32(x), at_least_float32(tf.convert_to_tensor(self.gamma))
        scale = tf.sqrt(tf.reduce_mean(wide * wide, -1, keepdims=True) + self.epsilon)  # (B, S, 1)
        return tf.cast(wide / scale * gamma, x.dtype)
