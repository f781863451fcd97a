"""Dropout: `common.spec.dropout_masks` in TensorFlow's 64-bit integers, bit for bit, or
TensorFlow's own.

Both are drawn on the stage's own device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import tensorflow as tf

from common.spec.dropout_masks import MASK32, MULTIPLIERS, mix, threshold
from tf_impl.precision import at_least_float32


class DropoutContext(NamedTuple):
    """What the masks of one micro-batch depend on, besides their site. Tensors, so that one trace
    serves all steps.
    """

    step_key: tf.Tensor  # () int64
    samples: tf.Tensor  # (b,) int64, indices in the mini-batch


def _mix_tensor(x: tf.Tensor) -> tf.Tensor:
    """`common.spec.dropout_masks.mix` of int64 values in [0, 2^32)."""
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _int64(16)))
    x = tf.bitwise.bitwise_and(x * MULTIPLIERS[0], _int64(MASK32))
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _int64(15)))
    x = tf.bitwise.bitwise_and(x * MULTIPLIERS[1], _int64(MASK32))
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _int64(15)))


def keep_mask(
    context: DropoutContext, site: int, shape: tf.TensorShape, probability: float
) -> tf.Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...) and static.

    Shifts and `^` change places, so the mixer's first shift is done on rows and elements (which
    TensorFlow computes once, as they are constant). The rest is in uint32, half the memory, whose
    products wrap at 2^32; not in int32, for which there is no product on GPUs. The comparison is in
    int64: GPUs have none in uint32.
    """
    site_key = _mix_tensor(tf.bitwise.bitwise_xor(context.step_key, _int64(mix(site))))  # ()
    row = _mix_tensor(tf.bitwise.bitwise_xor(site_key, _mix_tensor(context.samples)))  # (b,)
    elements = _mix_tensor(tf.range(math.prod(shape[1:]), dtype=tf.int64))  # (n,)
    bits = tf.bitwise.bitwise_xor(
        _first_shift(row)[:, None], _first_shift(elements)[None, :]
    )  # (b, n) uint32
    for multiplier in MULTIPLIERS:
        bits = bits * tf.constant(multiplier, tf.uint32)
        bits = tf.bitwise.bitwise_xor(
            bits, tf.bitwise.right_shift(bits, tf.constant(15, tf.uint32))
        )
    return tf.reshape(tf.cast(bits, tf.int64) >= threshold(probability), shape)


def _first_shift(x: tf.Tensor) -> tf.Tensor:
    """`x ^ (x >> 16)` as uint32."""
    return tf.cast(tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _int64(16))), tf.uint32)


def dropout(
    x: tf.Tensor, probability: float, site: int, context: DropoutContext | None
) -> tf.Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a context or with probability
    0.
    """
    if context is None or probability == 0:
        return x
    return _masked(x, keep_mask(context, site, x.shape, probability), probability)


def native_dropout(
    x: tf.Tensor, probability: float, site: int, context: DropoutContext | None
) -> tf.Tensor:
    """Return the same with TensorFlow's masks. They depend on a seed alone, so no schedule and no
    recomputation changes them.

    Differs: `tf.nn.experimental.stateless_dropout`, written out to draw in float32. It draws in the
    precision of `x`, and in bfloat16 there are 128 draws: 1.6 % are dropped where 1 % is asked for,
    and 0.8 % where 0.1 % is.
    """
    if context is None or probability == 0:
        return x
    seed = tf.stack(
        [tf.bitwise.bitwise_xor(context.step_key, _int64(mix(site))), context.samples[0]]
    )
    kept = tf.random.stateless_uniform(x.shape, seed, alg="philox") >= probability
    return _masked(x, kept, probability)


def _masked(x: tf.Tensor, kept: tf.Tensor, probability: float) -> tf.Tensor:
    scaled = tf.cast(at_least_float32(x) * (1.0 / (1.0 - probability)), x.dtype)
    return tf.where(kept, scaled, tf.zeros((), x.dtype))


def _int64(value: int) -> tf.Tensor:
    return tf.constant(value, tf.int64)
