"""Sums over processes, by TensorFlow's collectives, in the order of the ranks.

The order makes the bits depend on the number of ranks alone: `CollectiveReduceV2` adds the pieces
of a buffer in different orders from 3 ranks on.

Differs: PyTorch has groups of its own. Paddle has them too, and its `groups.py` makes those of a
pipeline. TensorFlow has collectives, and its strategies use them, but nobody else finds a group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import tensorflow as tf

FIRST_KEY = 1_000
"""Of groups; TensorFlow's strategies count theirs from 1."""


class Group:
    """Some ranks that add up; each of them makes it with the same `key`, which no other has."""

    def __init__(self, device: str, rank: int, size: int, key: int) -> None:
        """`device` is this process' CPU."""
        self._device, self.size, self._key = device, size, FIRST_KEY + key
        # An operation with a new key has to ask the group's leader, so one of a kind keeps its own.
        self._keys: dict[tuple[str, tf.TensorShape, tf.DType], int] = {}
        # TensorFlow orders a group by the names of its tasks, where 10 comes before 2.
        ranks = self._call("CollectiveGatherV2", tf.constant([float(rank)])).numpy()
        self._places = sorted(range(size), key=ranks.tolist().__getitem__)

    def gather(self, tensor: tf.Tensor) -> list[tf.Tensor]:
        """Return the `tensor` of every rank of the group, in the order of the ranks."""
        return self._in_order(self._call("CollectiveGatherV2", tensor[None]))

    def sum(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the sum over the group, added in the order of the ranks."""
        return self._added(self.gather(tensor))

    def sum_of_slices(self, slices: tf.Tensor, wire: tf.DType | None = None) -> tf.Tensor:
        """As `sum`, with less traffic: of as many slices as there are ranks, (size, n), each rank
        adds up one. What travels is rounded to `wire`, the sum too; it is added in its own type.
        """
        kind = wire or slices.dtype
        received = self._call("CollectiveAllToAllV2", _packed(slices, wire))
        rows = tf.cast(tf.bitcast(received, kind), slices.dtype)  # (size, n), of each rank one
        total = self._added(self._in_order(rows))  # (n,)
        sums = self._call("CollectiveGatherV2", _packed(total[None], wire))
        return tf.cast(tf.bitcast(sums, kind), slices.dtype)  # as they were, (size, n)

    def _in_order(self, rows: tf.Tensor) -> list[tf.Tensor]:
        found = tf.unstack(rows)
        return [found[place] for place in self._places]

    def _added(self, rows: Sequence[tf.Tensor]) -> tf.Tensor:
        with tf.device(self._device):
            return functools.reduce(tf.add, rows)

    def _call(self, operation: str, rows: tf.Tensor) -> tf.Tensor:
        """One of TensorFlow's collectives; returns when all ranks of the group have called it."""
        if self.size == 1:
            return rows
        kind = (operation, rows.shape, rows.dtype)
        with tf.device(self._device):
            return getattr(tf.raw_ops, operation)(
                input=tf.identity(rows),  # from a GPU, where it is on one
                group_size=self.size,
                group_key=self._key,
                instance_key=self._keys.setdefault(kind, len(self._keys) + 1),
                ordering_token=[],
                communication_hint="auto",
                timeout_seconds=0,  # none: a hang is for the parent to find
                is_stateless=True,
            )


def _packed(values: tf.Tensor, wire: tf.DType | None) -> tf.Tensor:
    """The values as they travel: as halves, whichever they are, since collectives do not know
    bfloat16. They are rounded by way of float32, as in every framework.
    """
    if wire is None:
        return values
    return tf.bitcast(tf.cast(tf.cast(values, tf.float32), wire), tf.float16)
