"""How the weights of a row of layers are updated: gradients of all stages, one optimizer, tied
weights, and copies in bfloat16.

    gradients of a step, on each stage    sums over micro-batches, in float32 at least
    a tied weight's two copies            each gets the sum of both
    the norm over all stages              one number a weight, on the host, in float64
    a step of every stage's optimizer     its weights' masters, all stages at once
    the layers' own copies                cast from the masters
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from common.oracle.reference import clip_scale, global_norm
from common.spec.run import TransformerSpec
from tf_impl.device_shards import parts_of
from tf_impl.keras_optimizers import moments_of
from tf_impl.keras_pipeline.chunk import Chunk, Weight
from tf_impl.optimizer import StageOptimizer
from tf_impl.stage import Stage


class UpdatedRow(keras.Model):
    """The part of a `GPipeModel` that updates its weights."""

    spec: TransformerSpec | None
    chunks: list[Chunk]
    stages: list[Stage]
    held: tuple[int, ...]
    _strategies: list[tf.distribute.Strategy]
    _optimizers: dict[int, StageOptimizer]
    """By device; none before the first step after `compile`."""

    def apply_gradients(self, step: int | None = None) -> float:
        """Clip over all stages, then do a step (default: the next). Returns the norm before."""
        self._ensure_optimizers()
        step = int(self.optimizer.iterations) if step is None else step
        self.optimizer.iterations.assign(step)
        rate = float(self.optimizer.learning_rate)
        # One number per weight comes to the host, so the norm too has one order of summing.
        norm, scales = 0.0, [1.0] * len(self.stages)
        if self.optimizer.global_clipnorm is not None:
            squares = self.on_all_stages(lambda d: self._optimizers[d].squared_norms())
            norm, scales = self._clip(squares)
        self.on_all_stages(lambda d: self._optimizers[d].step(rate, scales[d]))
        # Every stage has advanced the same counters; any of them gives them back.
        next(each for each in self._optimizers.values() if not each.is_empty).share()
        self.cast_masters()
        return norm

    def reset_optimizer(self) -> None:
        """Forget moments and steps of one of `tf_impl.optimizer`'s, whose slots begin with 0."""
        for variable in self.optimizer.variables:
            if variable is not self.optimizer._learning_rate:
                variable.assign(tf.zeros(variable.shape, variable.dtype))

    def cast_masters(self) -> None:
        """Give the layers what they compute with, where it is less precise than the optimizer's."""

        def cast(d: int) -> None:
            for chunk in self.stages[d].chunks:
                chunk.cast_masters()

        if self._copies:
            self.on_all_stages(cast)

    def master_of(self, variable: keras.Variable) -> keras.Variable:
        """Return what the optimizer updates for a weight of a layer."""
        return next(w.master for w in self._weights if w.variable is variable)

    def moments(self) -> dict[str, Callable[[keras.Variable], tf.Variable]]:
        """Return by "first_moment" and "second_moment", if it has them, where a weight's is."""
        self._build_optimizer()
        return moments_of(self.optimizer, self._masters)

    def gradient_of(self, variable: keras.Variable) -> tf.Variable:
        """Where the gradients of a weight (its master) are added up."""
        return next(w.gradient for w in self._weights if w.master is variable)

    @property
    def _tied(self) -> list[tuple[Any, Any]]:
        """The token embedding and the tied head's copy of it, each shard's where they are cut: what
        the optimizer updates. Nothing without a tied head; None for one that another process holds.
        """
        if self.spec is None or not self.spec.tied_head:
            return []
        first, last = (
            [self.master_of(part.token) for part in parts_of(unit)] if unit.built else []
            for unit in (self.units[0], self.units[-1])
        )
        return list(itertools.zip_longest(first, last))

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: its own plus that of the head's copy, put in both."""
        for pair in self._tied:
            # Both optimizers then make the same step, and the two copies stay equal bit by bit.
            own, copy = map(self.gradient_of, pair)
            own.assign_add(copy)
            copy.assign(own)

    def _clip(self, squares: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
        """From each stage's squared norms: the norm over all, and each stage's scale."""
        norm = global_norm([square for stage in squares for square in stage])
        return norm, [clip_scale(norm, self.optimizer.global_clipnorm)] * len(self.stages)

    def _make_optimizer(self, d: int) -> StageOptimizer:
        weights = [weight for chunk in self.stages[d].chunks for weight in chunk.updated()]
        variables, gradients = [w.master for w in weights], [w.gradient for w in weights]
        # The tied copy's gradient is the embedding's: it counts once in the global norm.
        copies = {id(copy) for _, copy in self._tied}
        counted = [w.gradient for w in weights if id(w.master) not in copies]
        return StageOptimizer(self.optimizer, self._strategies[d], variables, gradients, counted)

    def _ensure_optimizers(self) -> None:
        self._build_optimizer()
        if not self._optimizers:
            made = self.on_all_stages(self._make_optimizer)
            self._optimizers = dict(zip(self.held, made, strict=True))

    def _build_optimizer(self) -> None:
        if not self.optimizer.built:
            self.optimizer.build(self._masters)

    def _claim_optimizer(self) -> None:
        """Where the optimizer updates masters, build it before a callback does for the copies."""
        if self.compiled and self._copies:
            self._build_optimizer()

    @property
    def _weights(self) -> list[Weight]:
        """Those of all chunks, in Keras' order."""
        return [weight for chunk in self.chunks for weight in chunk.weights]

    @property
    def _masters(self) -> list[keras.Variable]:
        """What the optimizer updates."""
        return [weight.master for weight in self._weights]
