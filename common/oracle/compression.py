"""Compressed sums of gradients over replicas, in NumPy: the definition of each compressor.

    replica 0   e0 + g0 ──► compress ──► what travels ──┐
                ▲                 │                     ├──► added up in the order of the replicas
                └── e0: the rest ─┘                     │
    replica 1   e1 + g1 ──► ...  ───────────────────────┘

`common.spec.compression` says what travels. An example of top-k with one value of four: g is (3, 1,
0, -2), so (3, 0, 0, 0) is sent and (0, 1, 0, -2) remembered; with the same g again (0, 0, 0, -4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.oracle.reference import Oracle
from common.spec.compression import INDEPENDENT, Compression
from common.spec.data import Batch
from common.spec.parameters import TOKEN_EMBEDDING, first_factor
from common.spec.rounding import in_precision
from common.spec.run import RunConfig

Array = NDArray[Any]
Arrays = dict[str, Array]

TIED_COPY = "head.tied"
"""A tied head's copy of the token embedding: its gradient is compressed by itself."""


class CompressedSum:
    """All replicas' sides of a training's sums, with what each of them remembers."""

    def __init__(self, compression: Compression, seed: int) -> None:
        self._compression, self._seed = compression, seed
        self._memory: dict[tuple[str, int], Array] = {}
        """By name and replica: what it has not sent yet."""
        self._factors: Arrays = {}
        """PowerSGD's Q by name, the same on all replicas."""

    def __call__(self, replicas: Sequence[Mapping[str, Array]]) -> Arrays:
        """Return the sum over the replicas' gradients by name, as each of them gets it."""
        return {name: self._sum(name, [each[name] for each in replicas]) for name in replicas[0]}

    def _sum(self, name: str, gradients: Sequence[Array]) -> Array:
        kind = self._compression.kind
        if kind in ("fp16", "bf16"):  # the sum travels too, so it is rounded as well
            rounded = _to_float16 if kind == "fp16" else _to_bfloat16
            return rounded(reduce(np.add, map(rounded, gradients)))
        if rank := self._compression.factor_rank(gradients[0].shape):
            return self._low_rank(name, gradients, rank)
        if not self._compression.is_gathered:
            return reduce(np.add, gradients)
        keep = self._largest if kind == "topk" else _scaled_signs
        sent = (self._fed_back(name, r, g, keep) for r, g in enumerate(gradients))
        return reduce(np.add, sent)

    def _fed_back(
        self, name: str, r: int, gradient: Array, keep: Callable[[Array], Array]
    ) -> Array:
        """Return what replica r sends; remember the rest."""
        if not self._compression.remembers:
            return keep(gradient)
        whole = self._memory.get((name, r), 0.0) + gradient
        sent = keep(whole)
        self._memory[name, r] = whole - sent
        return sent

    def _largest(self, whole: Array) -> Array:
        """Of the k largest by magnitude their values, else 0."""
        flat = whole.ravel()
        kept = np.argsort(-np.abs(flat), kind="stable")[: self._compression.kept(flat.size)]
        sent = np.zeros_like(flat)
        sent[kept] = flat[kept]
        return sent.reshape(whole.shape)

    def _low_rank(self, name: str, gradients: Sequence[Array], rank: int) -> Array:
        """One step of the power method (Vogels et al. 2019, algorithms 1 and 2).

        P = sum of M Q, its columns made orthonormal; Q = sum of M^T P. The sum is taken for P Q^T;
        each replica remembers M less its share of that.
        """
        whole = [self._memory.get((name, r), 0.0) + g for r, g in enumerate(gradients)]
        rows_columns = whole[0].shape
        of_copy = name == TIED_COPY
        parameter = TOKEN_EMBEDDING if of_copy else name
        q = self._factors.get(name)
        if q is None:
            first = first_factor(parameter, of_copy, rows_columns[1], rank, self._seed)
            q = first.astype(np.float64)
        p = orthonormal(reduce(np.add, (m @ q for m in whole)))  # (n1, R)
        new = reduce(np.add, (m.T @ p for m in whole))  # (n2, R)
        # A column of 0 would stay 0 for ever; the last one may find something in a later gradient.
        self._factors[name] = np.where(new.any(0), new, q)
        total: Array = p @ new.T
        for r, m in enumerate(whole):
            self._memory[name, r] = m - total / len(whole)
        return total


def orthonormal(p: Array) -> Array:
    """Return orthonormal columns with the span of `p`'s, one after another (Gram and Schmidt), and
    0 in place of one that depends on those before.
    """
    columns: list[Array] = []
    for column in p.T:
        rest = column
        for other in columns:
            rest = rest - other * (other @ rest)
        norm = np.sqrt(rest @ rest)
        columns.append(rest / norm if norm > INDEPENDENT * np.sqrt(column @ column) else 0 * rest)
    return np.stack(columns, 1)


def _scaled_signs(whole: Array) -> Array:
    """1 where a value is at least 0, else -1, times the mean magnitude."""
    sent: Array = np.where(whole >= 0, 1.0, -1.0) * np.abs(whole).mean()  # as `whole`
    return sent


def _to_float16(values: Array) -> Array:
    with np.errstate(over="ignore"):  # infinite, as in every framework
        # By way of float32, as the frameworks round a float64.
        return values.astype(np.float32).astype(np.float16).astype(np.float64)


def _to_bfloat16(values: Array) -> Array:
    return in_precision(values, "bfloat16").astype(np.float64)


class ReplicatedOracle(Oracle):
    """`Oracle` whose gradients are the compressed sums over a run's replicas."""

    def __init__(self, config: RunConfig, weights: Mapping[str, Array]) -> None:
        super().__init__(config.model, config.train, dict(weights))
        self._replicas, self._micro_batches = config.replicas, config.train.micro_batches
        self._sum = CompressedSum(config.compression, config.train.seed)

    def forward_backward(self, batch: Batch, first_sample: int = 0) -> float:
        """Return the mean loss per token; `gradients` then holds the compressed sums by name."""
        loss, found = 0.0, []
        for replica in range(self._replicas):
            pieces = batch.share(replica, self._replicas, self._micro_batches)
            rows = [
                np.concatenate([getattr(p, name) for p in pieces]) for name in ("inputs", "targets")
            ]
            own = Batch(batch.step, *rows)
            share = own.num_tokens / batch.num_tokens
            self.gradients = self._no_gradients()
            if own.num_tokens:
                loss += share * super().forward_backward(own, int(pieces[0].samples[0]))
            if self.model.tied_head:
                self.gradients.setdefault(TIED_COPY, np.zeros_like(self.weights[TOKEN_EMBEDDING]))
            found.append({name: share * g for name, g in self.gradients.items()})
        self.gradients = self._sum(found)
        if self.model.tied_head:
            self.gradients[TOKEN_EMBEDDING] += self.gradients.pop(TIED_COPY)
        return loss

    def _head_backward(self, grad: Array, saved: Any, grads: Arrays) -> Array:
        """As the model's; a tied head's share of the embedding's gradient stays apart until it is
        summed, as the copies of a pipeline's two ends do.
        """
        grad = super()._head_backward(grad, saved, grads)
        if self.model.tied_head:
            grads[TIED_COPY] = grads[TOKEN_EMBEDDING]
            grads[TOKEN_EMBEDDING] = np.zeros_like(grads[TOKEN_EMBEDDING])
        return grad
