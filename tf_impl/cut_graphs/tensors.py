"""Small questions about graphs, tensors and their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def dense(gradient: tf.Tensor | tf.IndexedSlices, dtype: tf.DType) -> tf.Tensor:
    """Return the gradient as one tensor; an embedding's rows are added up, in `dtype`."""
    if isinstance(gradient, tf.IndexedSlices) and gradient.dtype != dtype:
        values = tf.cast(gradient.values, dtype)
        gradient = tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return tf.convert_to_tensor(gradient)


def unbundled(tensor: tf.Tensor) -> tf.Tensor:
    """Return what an IdentityN copies. A custom gradient bundles its results and arguments in one,
    and nobody needs them all.
    """
    while tensor.op.type == "IdentityN":
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def source_of(tensor: tf.Tensor) -> tf.Tensor:
    """Return the tensor with these values in the fewest bytes: what it copies, or was cast from."""
    while True:
        tensor = unbundled(tensor)
        op = tensor.op
        # bfloat16 to float32 adds zeros only: save 2 bytes an element and cast again
        is_wider = op.type == "Cast" and op.inputs[0].dtype.size < tensor.dtype.size
        if op.type != "Identity" and not is_wider:
            return tensor
        tensor = op.inputs[0]


def ancestors(operations: Iterable[tf.Operation], given: Iterable[Any] = ()) -> set[tf.Operation]:
    """`operations` and all that they need, not looking behind the `given` tensors (references)."""
    known, found, waiting = set(given), set(), list(operations)
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [t.op for t in map(unbundled, op.inputs) if t.ref() not in known]
    return found


def memory_bytes(tensors: Iterable[tf.Tensor], not_counted: Iterable[tf.Tensor] = ()) -> int:
    """Return the sizes of `tensors` without those that are `not_counted`, those of shards on other
    devices than the stage's, and those of no static size: a loop's lists.
    """
    left_out = {t.ref() for t in not_counted}
    counted = [t for t in tensors if t.ref() not in left_out and not t.op.device]
    return sum((t.shape.num_elements() or 0) * t.dtype.size for t in counted)


def unique(tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    """Return every tensor once, in the order of their first places."""
    return list({t.ref(): t for t in tensors}.values())
