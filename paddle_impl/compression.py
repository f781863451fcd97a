"""What replicas send instead of their gradients; `common.spec.compression` has the kinds and
`common/oracle/compression.py` their definitions.

    gathered    each replica's words, which all add up in the order of the ranks     top-k, signs
    low rank    the sum of P, made orthonormal, then the sum of Q, for P Q^T         PowerSGD

Every tensor has its canonical shape here, in which a linear layer's weight is (in, out).

Differs: nothing is transposed; Paddle's Linear stores (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import paddle
from paddle import Tensor, distributed
from paddle.distributed.communication.group import Group

from common.spec.compression import INDEPENDENT, WORD_BITS, Compression
from common.spec.parameters import first_factor
from common.spec.run import RunConfig
from paddle_impl.gradient_sum import GradientSum
from paddle_impl.weights import NamedParameter

WIRES = {"fp16": "float16", "bf16": "bfloat16"}


class RunningSum(Protocol):
    """A sum over replicas that has begun."""

    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""


class Compressor:
    """Compresses a chunk's gradients, and remembers for every tensor what it has not sent yet."""

    def __init__(self, config: RunConfig, named: Sequence[NamedParameter]) -> None:
        self.compression: Compression = config.compression
        dtype, shapes = config.train.master_dtype, [item.parameter.shape for item in named]
        self.rests = [
            paddle.zeros(shape, dtype) if self.compression.remembers else None for shape in shapes
        ]
        """None where nothing is remembered."""
        self.factors: list[Tensor | None] = []
        """PowerSGD's Q, (n2, R); None for what is sent whole."""
        for item, shape in zip(named, shapes, strict=True):
            rank = self.compression.factor_rank(shape)
            q = first_factor(item.name, item.is_copy, shape[-1], rank, config.train.seed)
            self.factors.append(paddle.to_tensor(q.astype(dtype)) if rank else None)

    def start(self, gradients: Sequence[Tensor], group: Group) -> RunningSum:
        """Begin to add up the gradients over a group of replicas."""
        begun: RunningSum
        if self.compression.is_gathered:
            begun = GatheredSum(self, gradients, group)
        elif self.compression.kind == "powersgd":
            begun = LowRankSum(self, gradients, group)
        else:
            begun = GradientSum(gradients, group, WIRES.get(self.compression.kind))
        return begun


class GatheredSum:
    """What every replica sends of every tensor, decoded and added up."""

    @paddle.no_grad()
    def __init__(self, own: Compressor, gradients: Sequence[Tensor], group: Group) -> None:
        self._gradients, self._compression = gradients, own.compression
        sent = []
        for gradient, rest in zip(gradients, own.rests, strict=True):
            whole = gradient if rest is None else rest.add_(gradient)
            sent.append(encode(self._compression, whole))
            if rest is not None:
                rest.subtract_(decode(self._compression, *sent[-1], rest))
        # Of both kinds one message: all words, then all values.
        self._rows, self._tasks = [], []
        for parts in zip(*sent, strict=True):
            message = paddle.concat(parts)  # (n,)
            rows = paddle.empty([group.nranks, message.size], message.dtype)
            task = distributed.stream.all_gather(rows, message, group=group, sync_op=False)
            self._rows.append((rows, [part.size for part in parts]))
            self._tasks.append(task)

    @paddle.no_grad()
    def finish(self) -> None:
        for task in self._tasks:
            task.wait()
        words, values = (rows.split(sizes, 1) for rows, sizes in self._rows)  # (d, ...) of each
        for gradient, *sent in zip(self._gradients, words, values, strict=True):
            total, *others = (
                decode(self._compression, w, v, gradient) for w, v in zip(*sent, strict=True)
            )
            for other in others:
                total = total + other
            gradient.copy_(total, True)


class LowRankSum:
    """The sums of P and Q, and of the tensors that are sent whole."""

    @paddle.no_grad()
    def __init__(self, own: Compressor, gradients: Sequence[Tensor], group: Group) -> None:
        self._own, self._gradients, self._group = own, gradients, group
        self._parts = []  # P, (n1, R), or the gradient itself
        for gradient, rest, q in zip(gradients, own.rests, own.factors, strict=True):
            assert rest is not None
            self._parts.append(gradient if q is None else rest.add_(gradient).matmul(q))
        self._sum = GradientSum(self._parts, group)

    @paddle.no_grad()
    def finish(self) -> None:
        self._sum.finish()
        own = self._own
        low = [i for i, q in enumerate(own.factors) if q is not None]
        left = {i: orthonormal(self._parts[i]) for i in low}
        right = {i: own.rests[i].T @ left[i] for i in low}  # type: ignore[union-attr]
        if low:
            GradientSum(list(right.values()), self._group).finish()
        for i in low:
            total, rest, q = left[i] @ right[i].T, own.rests[i], own.factors[i]
            rest.subtract_(total / self._group.nranks)  # type: ignore[union-attr]
            self._gradients[i].copy_(total, True)
            # A column of 0 would stay 0 for ever.
            own.factors[i] = paddle.where((right[i] != 0).any(0), right[i], q)


def orthonormal(p: Tensor) -> Tensor:
    """Return orthonormal columns (n1, R) with the span of `p`'s; 0 for one that adds nothing."""
    columns: list[Tensor] = []
    for column in p.unbind(1):
        rest = column
        for other in columns:
            rest = rest - other * paddle.dot(other, rest)
        norm = paddle.dot(rest, rest).sqrt()
        is_new = norm > INDEPENDENT * paddle.dot(column, column).sqrt()
        columns.append(paddle.where(is_new, rest / norm, paddle.zeros_like(rest)))
    return paddle.stack(columns, 1)


def encode(compression: Compression, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is sent of a tensor: words of 32 bits, and values."""
    flat = whole.flatten()  # (n,)
    if compression.kind == "topk":
        places = flat.abs().topk(compression.kept(flat.size))[1]
        return places.astype("int32"), flat[places]
    bits = (flat >= 0).astype("int32")
    bits = paddle.concat([bits, paddle.zeros([-flat.size % WORD_BITS], "int32")])
    signs = (bits.reshape([-1, WORD_BITS]) * _powers()).sum(1).astype("int32")
    return signs, flat.abs().mean().reshape([1])


def decode(compression: Compression, words: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that was encoded, with the shape of `like`."""
    if compression.kind == "topk":
        flat = paddle.scatter(paddle.zeros([like.size], values.dtype), words, values)
    else:
        bits = paddle.bitwise_and(words.unsqueeze(1), _powers()) != 0  # (words, 32)
        flat = paddle.where(bits.flatten()[: like.size], values, -values)
    return flat.reshape(like.shape)


def _powers() -> Tensor:
    """The values of a word's bits; the last is its sign."""
    powers = [2**i for i in range(WORD_BITS - 1)]
    return paddle.to_tensor([*powers, -(2 ** (WORD_BITS - 1))], "int32")
