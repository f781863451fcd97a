"""The sum of a chunk's gradients over its replicas, begun while the pipeline still computes.

The sum is in the order of the ranks, as everywhere (`groups.py`). Every rank adds up one slice for
all:

    rank 0   a0 a1 a2         a0+b0+c0                     all three slices
    rank 1   b0 b1 b2   ──►   a1+b1+c1               ──►   everywhere
    rank 2   c0 c1 c2         a2+b2+c2
             all-to-all       added in rank order    gather

Differs: TensorFlow's collectives return when they are done, so a thread waits for them; PyTorch's
and Paddle's are asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from tf_impl.groups import Group


# Traced, since operations called one by one would take Python's lock again and again from the
# thread that computes meanwhile.
@tf.function(autograph=False)
def _flat(gradients: Sequence[tf.Variable], slices: int) -> tf.Tensor:
    """All values in a row, with zeros behind them: (slices, n)."""
    values = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)
    return tf.reshape(tf.pad(values, [[0, -values.shape[0] % slices]]), [slices, -1])


@tf.function(autograph=False)
def _replace(gradients: Sequence[tf.Variable], total: tf.Tensor) -> None:
    sizes = [gradient.shape.num_elements() for gradient in gradients]
    pieces = tf.split(tf.reshape(total, [-1])[: sum(sizes)], sizes)
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.assign(tf.reshape(piece, gradient.shape), read_value=False)


class GradientSum:
    """Starts on construction, on a thread of `waiting`."""

    def __init__(
        self, gradients: Sequence[tf.Variable], group: Group, waiting: ThreadPoolExecutor
    ) -> None:
        self._gradients, self._group = list(gradients), group
        self._done = waiting.submit(self._run)

    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""
        self._done.result()

    def _run(self) -> None:
        slices = _flat(self._gradients, self._group.size)
        _replace(self._gradients, self._group.sum_of_slices(slices))
