"""Matrices that are cut over several devices of a stage (`common.spec.shards`), in one graph.

    device 0, the stage's    x ─┬─ shard 0 ── y0 ─┐           forward     y  = y0 + y1 + ...
                                │                 + ── y
    device 1                    └─ shard 1 ── y1 ─┘           backward    dx = dx0 + dx1 + ...

Both sums are on the stage's device, in the order of the shards. What is not cut (norms, the
residual stream, a row-parallel layer's bias) is there alone, so no copies have to be kept equal.

A tape would put the whole backward on the stage's device: each shard has a tape of its own, which
is asked on its device.

Differs: PyTorch's and Paddle's shards, threads or processes, hand each other what is summed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from tf_impl.cut_graphs.tensors import dense
from tf_impl.precision import at_least_float32


def on_shard(device: str | None) -> AbstractContextManager[Any]:
    """Return what a shard's operations are made in; `device` is None for the stage's own."""
    return contextlib.nullcontext() if device is None else tf.device(device)


class Shards(keras.layers.Layer):
    """Layers that stand for one: each has a part of its matrices, on a device of its own."""

    def __init__(
        self,
        parts: Sequence[keras.layers.Layer],
        strategies: Sequence[tf.distribute.Strategy],
        width: int,
        bias: bool = False,
    ) -> None:
        """`strategies`: the shards', the stage's first. `width`: features of the input, and of the
        output where there is a `bias`, which `build` makes. The rest is made here.
        """
        super().__init__(dtype=parts[0].dtype)
        self.parts, self.has_bias = list(parts), bias
        self.sum_dtype = "float32" if self.compute_dtype == "bfloat16" else self.compute_dtype
        _, *others = (s.extended.worker_devices[0] for s in strategies)
        self.devices: list[str | None] = [None, *others]
        for part, strategy in zip(self.parts, strategies, strict=True):
            with strategy.scope():
                part.build((None, None, width))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.bias = (
            self.add_weight(shape=input_shape[-1:], initializer="zeros", name="bias")
            if self.has_bias
            else None
        )

    def call(self, x: tf.Tensor, *context: Any, **options: Any) -> tf.Tensor:
        """Return the sum over the shards and, added once, the bias."""
        y = functools.reduce(tf.add, map(at_least_float32, self.each(x, *context, **options)))
        y = y if self.bias is None else y + at_least_float32(tf.convert_to_tensor(self.bias))
        return tf.cast(y, self.compute_dtype)

    def each(self, x: tf.Tensor, *context: Any, **options: Any) -> list[tf.Tensor]:
        """Return what every shard makes of `x`, on its device."""
        places = list(zip(self.parts, self.devices, strict=True))
        weights: list[tf.Tensor] = []
        for part, device in places:
            with on_shard(device):
                weights += map(tf.convert_to_tensor, part.trainable_variables)

        @tf.custom_gradient
        def run(x: tf.Tensor, *weights: tf.Tensor) -> Any:
            results, tapes, left = [], [], iter(weights)
            for part, device in places:
                own = list(itertools.islice(left, len(part.trainable_variables)))
                with on_shard(device), tf.GradientTape(watch_accessed_variables=False) as tape:
                    given = tf.identity(x)  # on its way to the device
                    tape.watch([given, *own] if x.dtype.is_floating else own)
                    y = part.stateless_call(own, [], given, *context, **options)[0]
                results.append(y)
                tapes.append((tape, y, [given, *own], device))

            def backward(*dys: tf.Tensor) -> Any:
                dx, dw = [], []
                for (tape, y, sources, device), dy in zip(tapes, dys, strict=True):
                    with on_shard(device):
                        of_input, *of_weights = tape.gradient(y, sources, output_gradients=dy)
                        dx.append(of_input)
                        dw += [dense(gradient, self.sum_dtype) for gradient in of_weights]
                return (functools.reduce(tf.add, dx) if x.dtype.is_floating else None, *dw)

            return results, backward

        found: list[tf.Tensor] = run(x, *weights)
        return found


def parts_of(layer: keras.layers.Layer) -> list[Any]:
    """Return the shards that stand for a layer, or itself."""
    cut = layer if isinstance(layer, Shards) else getattr(layer, "cut", None)
    return [layer] if cut is None else cut.parts


def rows_of(table: keras.Variable, tokens: tf.Tensor, first: int) -> tf.Tensor:
    """Return the rows of `tokens` (B, S) that a shard has, from `first` on; zeros for others."""
    own = (tokens >= first) & (tokens < first + table.shape[0])
    rows = tf.gather(table, tf.where(own, tokens - first, 0))  # (B, S, D)
    return tf.where(own[..., None], rows, tf.zeros((), rows.dtype))


def side_by_side(logits: Sequence[tf.Tensor], devices: Sequence[str | None]) -> tf.Tensor:
    """Return the shards' logits (..., V / t) as one tensor (..., V). `CrossEntropy` looks through
    it, so in training nothing computes it.
    """
    whole = tf.concat([at_least_float32(part) for part in logits], -1)
    whole._shards = list(zip(logits, devices, strict=True))
    return whole


class CrossEntropy(keras.losses.SparseCategoricalCrossentropy):
    """That of logits cut over the vocabulary (Shoeybi et al. 2019, section 3): a shard tells the
    stage three numbers of each position. Of whole logits it is Keras' own.
    """

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        shards = getattr(y_pred, "_shards", None)
        if shards is None:
            return super().call(y_true, y_pred)
        targets = tf.cast(y_true, tf.int64)  # (B, S)
        losses = _cross_entropy(targets, *zip(*shards, strict=True))
        return tf.where(targets == self.ignore_class, tf.zeros((), losses.dtype), losses)


def _cross_entropy(
    targets: tf.Tensor, logits: Sequence[tf.Tensor], devices: Sequence[str | None]
) -> tf.Tensor:
    """log(sum(exp(logits))) - the target's logit: (B, S)."""
    edges = [0, *itertools.accumulate(part.shape[-1] for part in logits)]

    @tf.custom_gradient
    def run(*logits: tf.Tensor) -> Any:
        places = list(zip(logits, edges[:-1], devices, strict=True))

        def on_each(work: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> list[tf.Tensor]:
            """`work(logits, hot)` of each shard, there; `hot` is 1 at a target that is there."""
            found = []
            for part, first, device in places:
                with on_shard(device):
                    wide = at_least_float32(part)  # (B, S, V / t)
                    hot = tf.one_hot(targets - first, part.shape[-1], dtype=wide.dtype)
                    found.append(work(wide, hot))
            return found

        top = functools.reduce(tf.maximum, on_each(lambda z, _: tf.reduce_max(z, -1)))  # (B, S)

        def powers(z: tf.Tensor) -> tf.Tensor:
            return tf.exp(z - top[..., None])

        total = functools.reduce(tf.add, on_each(lambda z, _: tf.reduce_sum(powers(z), -1)))
        chosen = functools.reduce(tf.add, on_each(lambda z, hot: tf.reduce_sum(z * hot, -1)))

        def backward(dy: tf.Tensor) -> list[tf.Tensor]:
            dz = on_each(lambda z, hot: (powers(z) / total[..., None] - hot) * dy[..., None])
            return [tf.cast(each, part.dtype) for each, part in zip(dz, logits, strict=True)]

        return tf.math.log(total) + (top - chosen), backward

    found: tf.Tensor = run(*logits)
    return found
