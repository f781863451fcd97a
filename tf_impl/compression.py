"""What replicas send instead of their gradients; `common.spec.compression` has the kinds and
`common/oracle/compression.py` their definitions.

    gathered    each replica's words, which all add up in the order of the ranks     top-k, signs
    low rank    the sum of P, made orthonormal, then the sum of Q, for P Q^T         PowerSGD

Every tensor has its canonical shape here, in which a linear layer's weight is (in, out).

Differs: TensorFlow's collectives return when they are done, so a thread does all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import tensorflow as tf

from common.spec.compression import INDEPENDENT, WORD_BITS, Compression
from common.spec.parameters import first_factor
from common.spec.run import RunConfig
from tf_impl.gradient_sum import GradientSum, added_up
from tf_impl.groups import Group
from tf_impl.weights import NamedParameter

WIRES = {"fp16": tf.float16, "bf16": tf.bfloat16}


class RunningSum(Protocol):
    """A sum over replicas that has begun."""

    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""


class Compressor:
    """Compresses a chunk's gradients, and remembers for every tensor what it has not sent yet."""

    def __init__(self, config: RunConfig, named: Sequence[NamedParameter]) -> None:
        self.compression: Compression = config.compression
        dtype = config.train.master_dtype
        shapes = [tuple(item.parameter.shape) for item in named]
        self.rests = [
            tf.Variable(tf.zeros(shape, dtype), trainable=False)
            for shape in shapes
            if self.compression.remembers
        ]
        """Empty where nothing is remembered."""
        self.factors: list[tf.Variable | None] = []
        """PowerSGD's Q, (n2, R); None for what is sent whole."""
        for item, shape in zip(named, shapes, strict=True):
            rank = self.compression.factor_rank(shape)
            q = first_factor(item.name, item.is_copy, shape[-1], rank, config.train.seed)
            self.factors.append(tf.Variable(q.astype(dtype), trainable=False) if rank else None)

    def start(
        self, gradients: Sequence[tf.Variable], group: Group, waiting: ThreadPoolExecutor
    ) -> RunningSum:
        """Begin to add up the gradients over a group of replicas."""
        if self.compression.is_gathered:
            return GatheredSum(self, gradients, group, waiting)
        if self.compression.kind == "powersgd":
            return LowRankSum(self, gradients, group, waiting)
        return GradientSum(gradients, group, waiting, WIRES.get(self.compression.kind))


class _Submitted:
    """A sum that runs in a thread that waits for the others."""

    def __init__(
        self,
        own: Compressor,
        gradients: Sequence[tf.Variable],
        group: Group,
        waiting: ThreadPoolExecutor,
    ) -> None:
        self._own, self._gradients, self._group = own, list(gradients), group
        self._done = waiting.submit(self._run)

    def _run(self) -> None:
        raise NotImplementedError


class GatheredSum(_Submitted):
    """What every replica sends of every tensor, decoded and added up."""

    def finish(self) -> None:
        self._done.result()

    def _run(self) -> None:
        own = self._own
        messages = _sent(own.compression, self._gradients, own.rests)
        rows = [tf.stack(self._group.gather(message)) for message in messages]  # (d, n)
        _received(own.compression, self._gradients, *rows)


@tf.function(autograph=False)
def _sent(
    compression: Compression, gradients: Sequence[tf.Variable], rests: Sequence[tf.Variable]
) -> list[tf.Tensor]:
    """All tensors' words and all their values; what they leave out is remembered."""
    sent = []
    for i, gradient in enumerate(gradients):
        whole = rests[i] + gradient if rests else tf.identity(gradient)
        sent.append(encode(compression, whole))
        if rests:
            rests[i].assign(whole - decode(compression, *sent[-1], whole), read_value=False)
    return [tf.concat(parts, 0) for parts in zip(*sent, strict=True)]


@tf.function(autograph=False)
def _received(
    compression: Compression, gradients: Sequence[tf.Variable], words: tf.Tensor, values: tf.Tensor
) -> None:
    """Put the sums of all rows into the gradients."""
    sizes = [compression.words_and_values(each.shape.num_elements()) for each in gradients]
    pieces = (
        tf.split(rows, n, 1)
        for rows, n in zip((words, values), zip(*sizes, strict=True), strict=True)
    )
    for gradient, *sent in zip(gradients, *pieces, strict=True):
        rows = zip(*map(tf.unstack, sent), strict=True)
        total = functools.reduce(tf.add, (decode(compression, w, v, gradient) for w, v in rows))
        gradient.assign(total, read_value=False)


class LowRankSum(_Submitted):
    """The sums of P and Q, and of the tensors that are sent whole."""

    def finish(self) -> None:
        self._done.result()

    def _run(self) -> None:
        own = self._own
        parts = added_up(_left(self._gradients, own.rests, own.factors), self._group)
        low = [i for i, q in enumerate(own.factors) if q is not None]
        left, right = _right([parts[i] for i in low], [own.rests[i] for i in low])
        right = added_up(right, self._group) if low else []
        _multiplied(
            [self._gradients[i] for i in low],
            [own.rests[i] for i in low],
            [own.factors[i] for i in low],
            left,
            right,
            self._group.size,
        )
        for gradient, q, part in zip(self._gradients, own.factors, parts, strict=True):
            if q is None:
                gradient.assign(part, read_value=False)


@tf.function(autograph=False)
def _left(gradients: Any, rests: Any, factors: Any) -> list[tf.Tensor]:
    """P of every tensor, (n1, R), or the gradient itself; the gradient joins what was left."""
    return [
        tf.identity(gradient) if q is None else tf.matmul(rest.assign_add(gradient), q)
        for gradient, rest, q in zip(gradients, rests, factors, strict=True)
    ]


@tf.function(autograph=False)
def _right(parts: Any, rests: Any) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """P made orthonormal, and this replica's Q, (n2, R)."""
    left = [orthonormal(p) for p in parts]
    return left, [tf.matmul(rest, p, transpose_a=True) for rest, p in zip(rests, left, strict=True)]


@tf.function(autograph=False)
def _multiplied(
    gradients: Any, rests: Any, factors: Any, left: Any, right: Any, replicas: int
) -> None:
    for gradient, rest, q, p, new in zip(gradients, rests, factors, left, right, strict=True):
        total = tf.matmul(p, new, transpose_b=True)
        rest.assign_sub(total / replicas, read_value=False)
        gradient.assign(total, read_value=False)
        # A column of 0 would stay 0 for ever.
        q.assign(tf.where(tf.reduce_any(new != 0, 0), new, q), read_value=False)


def orthonormal(p: tf.Tensor) -> tf.Tensor:
    """Return orthonormal columns (n1, R) with the span of `p`'s; 0 for one that adds nothing."""
    columns: list[tf.Tensor] = []
    for column in tf.unstack(p, axis=1):
        rest = column
        for other in columns:
            rest = rest - other * tf.tensordot(other, rest, 1)
        norm = tf.sqrt(tf.tensordot(rest, rest, 1))
        is_new = norm > INDEPENDENT * tf.sqrt(tf.tensordot(column, column, 1))
        columns.append(tf.where(is_new, rest / norm, tf.zeros_like(rest)))
    return tf.stack(columns, 1)


def encode(compression: Compression, whole: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return what is sent of a tensor: words of 32 bits, and values."""
    flat = tf.reshape(whole, [-1])  # (n,)
    if compression.kind == "topk":
        places = tf.math.top_k(tf.abs(flat), compression.kept(flat.shape[0]), sorted=False).indices
        return places, tf.gather(flat, places)
    bits = tf.pad(tf.cast(flat >= 0, tf.int32), [[0, -flat.shape[0] % WORD_BITS]])
    signs = tf.reduce_sum(tf.reshape(bits, [-1, WORD_BITS]) * _powers(), 1)
    return signs, tf.reshape(tf.reduce_mean(tf.abs(flat)), [1])


def decode(compression: Compression, words: tf.Tensor, values: tf.Tensor, like: Any) -> tf.Tensor:
    """Return the tensor that was encoded, with the shape of `like`."""
    size = like.shape.num_elements()
    if compression.kind == "topk":
        flat = tf.scatter_nd(words[:, None], values, [size])
    else:
        bits = tf.bitwise.bitwise_and(words[:, None], _powers()) != 0  # (words, 32)
        flat = tf.where(tf.reshape(bits, [-1])[:size], values, -values)
    return tf.reshape(flat, like.shape)


def _powers() -> tf.Tensor:
    """The values of a word's bits; the last is its sign."""
    powers = [2**i for i in range(WORD_BITS - 1)]
    return tf.constant([*powers, -(2 ** (WORD_BITS - 1))], tf.int32)
