"""A Transformer with a choice of norm, in any framework, for docs/batch-norm.md.

It is the project's (pre-norm, its initial weights), once with LayerNorm and once with batch norm
over all (sequences, positions) of a micro-batch in its place. Norms are the framework's own layers,
as are the few operations of `Ops`: tests/torch/plain.py and its like. Everything is float64, so
that a difference is not rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from common.oracle.reference import Oracle
from common.spec.data import Batch, Corpus
from common.spec.parameters import initial_weights
from common.spec.run import RunConfig

Kind = Literal["layer norm", "batch norm", "deferred batch norm"]
Array = NDArray[np.float64]
Arrays = dict[str, Array]
Tensor = Any
Loss = Callable[[dict[str, Tensor]], Tensor]
Norm = Callable[[Tensor, bool], Tensor]
"""x (N, D) and whether it is in training; without weight and bias."""

NEW_SHARE = 0.1
"""Of the running statistics: the weight of the newest batch, whatever a framework calls it."""
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Defaults:
    """A framework's batch norm as it comes, after one batch."""

    epsilon: float
    momentum: float
    running_mean: Array
    running_variance: Array


class Ops(Protocol):
    """What the model needs of a framework. Axes and shapes are NumPy's."""

    def tensor(self, array: NDArray[Any]) -> Tensor: ...
    def array(self, tensor: Tensor) -> NDArray[Any]: ...
    def take(self, table: Tensor, tokens: NDArray[Any]) -> Tensor: ...
    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor: ...
    def transpose(self, x: Tensor, axes: tuple[int, ...]) -> Tensor: ...
    def gelu(self, x: Tensor) -> Tensor: ...
    def softmax(self, x: Tensor) -> Tensor: ...
    def gradient(self, loss: Loss, weights: Arrays) -> tuple[float, Arrays]: ...
    def norm(self, kind: str, width: int, new_share: float, epsilon: float) -> Norm: ...
    def defaults(self, x: NDArray[Any]) -> Defaults: ...

    def cross_entropy(self, logits: Tensor, targets: NDArray[Any]) -> Tensor:
        """Return the sum over rows."""


class Deferred:
    """Batch norm as torchgpipe's DeferredBatchNorm has it (torchgpipe/batchnorm.py).

    Every micro-batch is normalised with its own statistics, as without it. Their sums are kept, and
    the running statistics change once a mini-batch, with the statistics of all of it.
    """

    def __init__(self, ops: Ops, width: int, epsilon: float, micro_batches: int) -> None:
        self.ops, self.micro_batches, self.tracked = ops, micro_batches, 0
        self.epsilon = epsilon
        self.layer = ops.norm("batch norm", width, NEW_SHARE, epsilon)
        self.mean, self.variance = np.zeros(width), np.ones(width)
        self.sums = np.zeros((3, width))

    def __call__(self, x: Tensor, training: bool) -> Tensor:  # (N, D)
        if not training:
            scale = self.ops.tensor(1 / np.sqrt(self.variance + self.epsilon))
            return (x - self.ops.tensor(self.mean)) * scale
        values = self.ops.array(x)
        self.sums += np.stack([values.sum(0), (values**2).sum(0), np.full(x.shape[1], len(values))])
        self.tracked += 1
        if self.tracked % self.micro_batches == 0:
            mean = self.sums[0] / self.sums[2]
            self.mean += NEW_SHARE * (mean - self.mean)
            self.variance += NEW_SHARE * (self.sums[1] / self.sums[2] - mean**2 - self.variance)
            self.sums[:] = 0
        return self.layer(x, True)


class Model:
    """The project's Transformer, pre-norm, with a choice of norm. It keeps running statistics and
    no weights.
    """

    def __init__(self, ops: Ops, config: RunConfig, kind: Kind, micro_batches: int) -> None:
        self.ops, self.spec, self.micro_batches = ops, config.model, micro_batches
        width, epsilon = self.spec.d_model, self.spec.norm_epsilon
        self.norms: dict[str, Norm] = {}
        blocks = range(self.spec.num_layers)
        for name in [*(f"block.{i}.norm_{n}" for i in blocks for n in (1, 2)), "head.norm"]:
            if kind == "deferred batch norm":
                self.norms[name] = Deferred(ops, width, epsilon, micro_batches)
            else:
                self.norms[name] = ops.norm(kind, width, NEW_SHARE, epsilon)

    def loss(
        self, w: Mapping[str, Tensor], tokens: NDArray[Any], targets: NDArray[Any], training: bool
    ) -> Tensor:
        """Return the loss summed over tokens (b, S)."""
        ops, (b, s), d = self.ops, tokens.shape, self.spec.d_model
        x = ops.take(w["embedding.token.weight"], tokens) + w["embedding.position.weight"][:s]

        def norm(x: Tensor, name: str) -> Tensor:  # (b, S, D)
            flat = self.norms[name](ops.reshape(x, (b * s, d)), training)
            return ops.reshape(flat, (b, s, d)) * w[f"{name}.weight"] + w[f"{name}.bias"]

        for i in range(self.spec.num_layers):
            x = x + self._attention(norm(x, f"block.{i}.norm_1"), w, f"block.{i}.attention")
            name = f"block.{i}.feed_forward"
            y = norm(x, f"block.{i}.norm_2")
            y = ops.gelu(y @ w[f"{name}.up.weight"] + w[f"{name}.up.bias"])  # (b, S, F)
            x = x + y @ w[f"{name}.down.weight"] + w[f"{name}.down.bias"]
        logits = norm(x, "head.norm") @ w["head.output.weight"]  # (b, S, V)
        return ops.cross_entropy(ops.reshape(logits, (b * s, -1)), targets.reshape(-1))

    def _attention(self, y: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        ops, heads = self.ops, self.spec.num_heads
        b, s, d = y.shape

        def split(x: Tensor) -> Tensor:  # (b, H, S, E)
            return ops.transpose(ops.reshape(x, (b, s, heads, d // heads)), (0, 2, 1, 3))

        q = split(y @ w[f"{name}.query.weight"] + w[f"{name}.query.bias"])
        k = split(y @ w[f"{name}.key.weight"])
        v = split(y @ w[f"{name}.value.weight"] + w[f"{name}.value.bias"])
        causal = ops.tensor(np.triu(np.full((s, s), -1e30), 1))
        scores = q @ ops.transpose(k, (0, 1, 3, 2)) / math.sqrt(d // heads)  # (b, H, S, S)
        mixed = ops.transpose(ops.softmax(scores + causal) @ v, (0, 2, 1, 3))  # (b, S, H, E)
        return ops.reshape(mixed, (b, s, d)) @ w[f"{name}.output.weight"] + w[f"{name}.output.bias"]

    def gradient(self, weights: Arrays, batch: Batch) -> tuple[float, Arrays]:
        """Return the mean loss of a mini-batch and its gradient, added over the micro-batches."""
        total, sums = 0.0, {name: np.zeros_like(value) for name, value in weights.items()}
        for piece in batch.micro_batches(self.micro_batches):
            loss = functools.partial(
                self.loss, tokens=piece.inputs, targets=piece.targets, training=True
            )
            value, gradients = self.ops.gradient(loss, weights)
            total += value / batch.num_tokens
            for name, gradient in gradients.items():
                sums[name] += gradient / batch.num_tokens
        return total, sums

    def evaluate(self, weights: Arrays, batch: Batch) -> float:
        """Return the mean loss with the running statistics."""
        held = {name: self.ops.tensor(value) for name, value in weights.items()}
        loss = self.loss(held, batch.inputs, batch.targets, training=False)
        return float(self.ops.array(loss)) / batch.num_tokens


def gradient_differences(
    ops: Ops, config: RunConfig, kind: Kind, counts: Sequence[int], batch: Batch
) -> list[float]:
    """Return |gradient for m - gradient for m = 1| / |gradient for m = 1|, over all tensors."""
    weights: Arrays = initial_weights(config.model, 0, "float64")
    found = {m: Model(ops, config, kind, m).gradient(weights, batch)[1] for m in {1, *counts}}
    return [distance(found[m], found[1]) for m in counts]


def oracle_difference(ops: Ops, config: RunConfig, batch: Batch) -> float:
    """Return how far the model with LayerNorm is from the project's oracle: it is the same one."""
    weights: Arrays = initial_weights(config.model, 0, "float64")
    oracle = Oracle(config.model, config.train, weights)
    oracle.forward_backward(batch)
    gradient = Model(ops, config, "layer norm", 1).gradient(weights, batch)[1]
    return distance(gradient, oracle.gradients)


def distance(a: Arrays, b: Arrays) -> float:
    squares = sum(float(((a[name] - b[name]) ** 2).sum()) for name in b)
    return math.sqrt(squares / sum(float((value**2).sum()) for value in b.values()))


def train(
    ops: Ops, config: RunConfig, kind: Kind, micro_batches: int, corpus: Corpus
) -> tuple[list[float], float]:
    """Return the loss of every step, and the held-out loss at the end. Adam, a constant rate."""
    weights: Arrays = initial_weights(config.model, 0, "float64")
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    model, losses = Model(ops, config, kind, micro_batches), []
    for step in range(config.train.steps):
        loss, gradients = model.gradient(weights, corpus.training_batch(config, step))
        losses.append(loss)
        for name, gradient in gradients.items():
            first[name] += 0.1 * (gradient - first[name])
            second[name] += 0.001 * (gradient**2 - second[name])
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - 0.999 ** (step + 1))
            weights[name] = weights[name] - LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)
    held_out = corpus.held_out_batch(0, 0, 4 * config.train.batch_size, config.model.context_length)
    return losses, model.evaluate(weights, held_out)
