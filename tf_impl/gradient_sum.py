"""The sum of a chunk's gradients over its replicas, begun while the pipeline still computes.

The sum is in the order of the ranks, as in `groups.py`. Every rank adds up one slice for all:

    rank 0   a0 a1 a2         a0+b0+c0                     all three slices
    rank 1   b0 b1 b2   ──►   a1+b1+c1               ──►   everywhere
    rank 2   c0 c1 c2         a2+b2+c2
             all-to-all       added in rank order    gather

What replicas send may be rounded to a `wire` type of half the size, and so is the sum they get.

Differs: TensorFlow's collectives return when they are done, so a thread waits for them; PyTorch's
and Paddle's are asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf

from tf_impl.groups import Group


# Traced, since operations called one by one would take Python's lock again and again from the
# thread that computes meanwhile.
@tf.function(autograph=False)
def _flat(gradients: Sequence[Any], slices: int) -> tf.Tensor:
    """All values in a row, with zeros behind them: (slices, n)."""
    values = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)
    return tf.reshape(tf.pad(values, [[0, -values.shape[0] % slices]]), [slices, -1])


@tf.function(autograph=False)
def _cut(like: Sequence[Any], total: tf.Tensor) -> list[tf.Tensor]:
    sizes = [each.shape.num_elements() for each in like]
    pieces = tf.split(tf.reshape(total, [-1])[: sum(sizes)], sizes)
    return [tf.reshape(piece, each.shape) for each, piece in zip(like, pieces, strict=True)]


@tf.function(autograph=False)
def _replace(gradients: Sequence[tf.Variable], sums: Sequence[tf.Tensor]) -> None:
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.assign(total, read_value=False)


def added_up(tensors: Sequence[Any], group: Group, wire: tf.DType | None = None) -> list[tf.Tensor]:
    """Return the tensors' sums over the group; returns when all ranks have called it."""
    sums: list[tf.Tensor] = _cut(tensors, group.sum_of_slices(_flat(tensors, group.size), wire))
    return sums


class GradientSum:
    """Starts on construction, on a thread of `waiting`."""

    def __init__(
        self,
        gradients: Sequence[tf.Variable],
        group: Group,
        waiting: ThreadPoolExecutor,
        wire: tf.DType | None = None,
    ) -> None:
        self._gradients, self._group, self._wire = list(gradients), group, wire
        self._done = waiting.submit(self._run)

    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""
        self._done.result()

    def _run(self) -> None:
        _replace(self._gradients, added_up(self._gradients, self._group, self._wire))
