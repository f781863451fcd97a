"""What replicas send instead of their gradients; `common.spec.compression` has the kinds and
`common/oracle/compression.py` their definitions.

    gathered    each replica's words, which all add up in the order of the ranks     top-k, signs
    low rank    the sum of P, made orthonormal, then the sum of Q, for P Q^T         PowerSGD

Every tensor has its canonical shape here, in which a linear layer's weight is (in, out).

Differs: PyTorch's PowerSGD (`data_parallel.py`) joins tensors to buckets, by a backward's hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from common.spec.compression import INDEPENDENT, WORD_BITS, Compression
from common.spec.parameters import first_factor
from common.spec.run import RunConfig
from torch_impl.gradient_sum import GradientSum
from torch_impl.weights import NamedParameter

WIRES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class RunningSum(Protocol):
    """A sum over replicas that has begun."""

    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""


class Compressor:
    """Compresses a chunk's gradients, and remembers for every tensor what it has not sent yet."""

    def __init__(self, config: RunConfig, named: Sequence[NamedParameter]) -> None:
        self.compression: Compression = config.compression
        # The order of a tensor's elements counts for its factors alone.
        is_low_rank = self.compression.kind == "powersgd"
        self._transposed = [item.transposed and is_low_rank for item in named]
        whole = self._canonical([item.parameter.detach() for item in named])
        dtype = getattr(torch, config.train.master_dtype)
        self.rests = [
            torch.zeros(w.shape, dtype=dtype, device=w.device)
            if self.compression.remembers
            else None
            for w in whole
        ]
        """None where nothing is remembered."""
        self.factors: list[Tensor | None] = []
        """PowerSGD's Q, (n2, R); None for what is sent whole."""
        for item, w in zip(named, whole, strict=True):
            rank = self.compression.factor_rank(w.shape)
            q = first_factor(item.name, item.is_copy, w.shape[-1], rank, config.train.seed)
            self.factors.append(torch.tensor(q, dtype=dtype, device=w.device) if rank else None)

    def start(self, gradients: Sequence[Tensor], group: Any) -> RunningSum:
        """Begin to add up the gradients over a group of replicas."""
        gradients = self._canonical(gradients)
        if self.compression.is_gathered:
            return GatheredSum(self, gradients, group)
        if self.compression.kind == "powersgd":
            return LowRankSum(self, gradients, group)
        return GradientSum(gradients, group, WIRES.get(self.compression.kind))

    def _canonical(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [each.T if t else each for each, t in zip(tensors, self._transposed, strict=True)]


class GatheredSum:
    """What every replica sends of every tensor, decoded and added up."""

    @torch.no_grad()
    def __init__(self, own: Compressor, gradients: Sequence[Tensor], group: Any) -> None:
        self._gradients, self._compression = gradients, own.compression
        sent = []
        for gradient, rest in zip(gradients, own.rests, strict=True):
            whole = gradient if rest is None else rest.add_(gradient)
            sent.append(encode(self._compression, whole))
            if rest is not None:
                rest.sub_(decode(self._compression, *sent[-1], rest))
        # Of both kinds one message: all words, then all values.
        self._rows, self._works = [], []
        for parts in zip(*sent, strict=True):
            message = torch.cat(parts)  # (n,)
            rows = message.new_empty(distributed.get_world_size(group) * len(message))
            work = distributed.all_gather_single(rows, message, group=group, async_op=True)
            self._rows.append((rows.view(-1, len(message)), [len(part) for part in parts]))
            self._works.append(work)

    @torch.no_grad()
    def finish(self) -> None:
        for work in self._works:
            work.wait()
        words, values = (rows.split(sizes, 1) for rows, sizes in self._rows)  # (d, ...) of each
        for gradient, *sent in zip(self._gradients, words, values, strict=True):
            total, *others = (
                decode(self._compression, w, v, gradient) for w, v in zip(*sent, strict=True)
            )
            for other in others:
                total += other
            gradient.copy_(total)


class LowRankSum:
    """The sums of P and Q, and of the tensors that are sent whole."""

    @torch.no_grad()
    def __init__(self, own: Compressor, gradients: Sequence[Tensor], group: Any) -> None:
        self._own, self._gradients, self._group = own, gradients, group
        self._parts = []  # P, (n1, R), or the gradient itself
        for gradient, rest, q in zip(gradients, own.rests, own.factors, strict=True):
            assert rest is not None
            self._parts.append(gradient if q is None else rest.add_(gradient) @ q)
        self._sum = GradientSum(self._parts, group)

    @torch.no_grad()
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
            rest.sub_(total / distributed.get_world_size(self._group))  # type: ignore[union-attr]
            self._gradients[i].copy_(total)
            # A column of 0 would stay 0 for ever.
            own.factors[i] = torch.where((right[i] != 0).any(0), right[i], q)  # type: ignore[arg-type]


def orthonormal(p: Tensor) -> Tensor:
    """Return orthonormal columns (n1, R) with the span of `p`'s; 0 for one that adds nothing."""
    columns: list[Tensor] = []
    for column in p.T:
        rest = column
        for other in columns:
            rest = rest - other * (other @ rest)
        norm = (rest @ rest).sqrt()
        is_new = norm > INDEPENDENT * (column @ column).sqrt()
        columns.append(torch.where(is_new, rest / norm, torch.zeros_like(rest)))
    return torch.stack(columns, 1)


def encode(compression: Compression, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is sent of a tensor: words of 32 bits, and values."""
    flat = whole.flatten()  # (n,)
    if compression.kind == "topk":
        places = flat.abs().topk(compression.kept(len(flat))).indices
        return places.int(), flat[places]
    bits = torch.nn.functional.pad(flat >= 0, (0, -len(flat) % WORD_BITS))
    signs = (bits.view(-1, WORD_BITS) * _powers(flat)).sum(1, dtype=torch.int32)
    return signs, flat.abs().mean().view(1)


def decode(compression: Compression, words: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that was encoded, with the shape of `like`."""
    if compression.kind == "topk":
        flat = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
        flat[words.long()] = values
    else:
        bits = (words[:, None] & _powers(words)) != 0  # (words, 32)
        flat = torch.where(bits.flatten()[: like.numel()], values, -values)
    return flat.view(like.shape)


def _powers(like: Tensor) -> Tensor:
    """The values of a word's bits; the last is its sign."""
    powers = [2**i for i in range(WORD_BITS - 1)]
    return torch.tensor([*powers, -(2 ** (WORD_BITS - 1))], dtype=torch.int32, device=like.device)
