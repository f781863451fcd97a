"""Dropout: `common.spec.dropout_masks` in 64-bit integers, bit for bit, or TensorFlow's own.

Both are drawn on the stage's own device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from common.spec.dropout_masks import MULTIPLIERS, mix, threshold
from tf_impl.precision import at_least_float32


class DropoutContext(NamedTuple):
    """What one micro-batch's masks depend on besides their site: tensors, for one trace."""

    step_key: tf.Tensor  # () int64
    samples: tf.Tensor  # (b,) int64, indices in the mini-batch


def keep_mask(
    context: DropoutContext,
    site: int,
    shape: tf.TensorShape,
    probability: float,
    part: tuple[int, int] = (0, 1),
) -> tf.Tensor:
    """True where the element is kept; bool of `shape`, which is (b, ...) and static.

    `part` is (which, of how many) of a larger tensor that is cut along its second axis, whose mask
    this is a part of: a shard's heads get the masks that they have where all heads are together.

    In uint32, whose products wrap at 2^32; not in int32, for which there is no product on GPUs. The
    comparison is in int64: GPUs have none in uint32. Shifts and `^` change places, so the mixer's
    first shift is done on rows and elements.
    """
    key = tf.bitwise.bitwise_xor(context.step_key, tf.constant(mix(site), tf.int64))  # ()
    site_key, samples = (_mix_tensor(tf.cast(x, tf.uint32)) for x in (key, context.samples))
    row = _mix_tensor(tf.bitwise.bitwise_xor(site_key, samples))  # (b,)
    n, (which, _) = math.prod(shape[1:]), part
    elements = _elements(which * n, (which + 1) * n)
    bits = tf.bitwise.bitwise_xor(_shifted(row, 16)[:, None], elements)  # (b, n)
    bits = _multiplied(bits)
    return tf.reshape(tf.cast(bits, tf.int64) >= threshold(probability), shape)


def _elements(start: int, stop: int) -> tf.Tensor:
    """(1, n): the hashes of elements' places, after the next mixer's first shift."""

    def made() -> tf.Tensor:
        places = tf.cast(tf.range(start, stop, dtype=tf.int64), tf.uint32)
        return _shifted(_mix_tensor(places), 16)[None, :]

    return _once(f"elements {start} {stop}", made)


def _mix_tensor(x: tf.Tensor) -> tf.Tensor:
    """`common.spec.dropout_masks.mix` of uint32 values."""
    return _multiplied(_shifted(x, 16))


def _multiplied(x: tf.Tensor) -> tf.Tensor:
    """The mixer without its first shift."""
    for multiplier in MULTIPLIERS:
        x = _shifted(x * _uint32(multiplier), 15)
    return x


def _shifted(x: tf.Tensor, by: int) -> tf.Tensor:
    """`x ^ (x >> by)`."""
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(by)))


def _uint32(value: int) -> tf.Tensor:
    return _once(f"uint32 {value}", lambda: tf.constant(value, tf.uint32))


def _once(name: str, make: Callable[[], tf.Tensor]) -> tf.Tensor:
    """What depends on no data, made once in a graph: masks are a quarter of what is traced."""
    if tf.executing_eagerly():
        return make()
    made = tf.compat.v1.get_default_graph().get_collection_ref(f"dropout: {name}")
    if not made:
        made.append(make())
    return made[0]


def dropout(
    x: tf.Tensor,
    probability: float,
    site: int,
    context: DropoutContext | None,
    part: tuple[int, int] = (0, 1),
) -> tf.Tensor:
    """Inverted dropout (Srivastava et al. 2014); `x` itself without a context or at 0."""
    if context is None or probability == 0:
        return x
    return _masked(x, keep_mask(context, site, x.shape, probability, part), probability)


def native_dropout(
    x: tf.Tensor,
    probability: float,
    site: int,
    context: DropoutContext | None,
    part: tuple[int, int] = (0, 1),
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
        [
            tf.bitwise.bitwise_xor(context.step_key, tf.constant(mix(site), tf.int64)),
            context.samples[0],
        ]
    )
    which, count = part
    whole = (x.shape[0], x.shape[1] * count, *x.shape[2:])
    kept = tf.random.stateless_uniform(whole, seed, alg="philox") >= probability
    return _masked(x, tf.split(kept, count, 1)[which], probability)


def _masked(x: tf.Tensor, kept: tf.Tensor, probability: float) -> tf.Tensor:
    scaled = tf.cast(at_least_float32(x) * (1.0 / (1.0 - probability)), x.dtype)
    return tf.where(kept, scaled, tf.zeros((), x.dtype))
