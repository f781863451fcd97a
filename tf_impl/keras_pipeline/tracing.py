"""Tracing a row of layers for micro-batches, and what the sum of their losses is divided by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from common.schedule.action import Schedule
from common.schedule.recompute import recomputes
from tf_impl.cut_graphs.functions import StageFunctions
from tf_impl.effects import with_mask
from tf_impl.keras_pipeline.batch import piece_sizes
from tf_impl.keras_pipeline.chunk import Chunk
from tf_impl.keras_pipeline.loss import BatchLoss, batch_loss


class Traced(NamedTuple):
    """What was traced for one shape of a mini-batch."""

    functions: list[list[StageFunctions]]
    """By chunk and micro-batch; micro-batches of one size share theirs."""
    mask_parts: dict[int, list[Any]]
    """By a micro-batch's size and chunk, where predictions have a mask: what computes it."""
    divisor: Callable[..., tf.Tensor] | None
    """(mask of the predictions or None, y[, sample_weight]) of a mini-batch -> what the sum of its
    losses is divided by. None where another process has the last chunk.
    """


class TracedRow(keras.Model):
    """The part of a `GPipeModel` that makes its functions."""

    schedule: Schedule
    chunks: list[Chunk]
    _traced: dict[Any, Traced]
    """By what a mini-batch is like: the shapes and types of its arrays."""
    _loss: BatchLoss | None
    """None until the last stage is traced: the first that sees a prediction."""
    _prediction: tf.TensorSpec
    """What the prediction for a micro-batch is like."""

    def _ensure_traced(self, x: tf.Tensor, labels: Sequence[tf.Tensor]) -> Traced:
        """Traces and cuts every chunk, for the one or two sizes of a batch's micro-batches."""
        m = self.schedule.num_micro_batches
        whole = [tf.TensorSpec(t.shape, t.dtype) for t in (x, *labels)]
        key = tuple(whole)
        if key not in self._traced:
            # Keras, too, sees which layers are trainable in the first step after `compile`
            if not self._traced:
                self._collect_variables()
            sizes = piece_sizes(len(x), m)
            found: dict[tuple[int, bool], list[StageFunctions]] = {}
            self._sample = tuple(labels)  # for `_understand_loss`: a loss is tried on real labels
            for size in dict.fromkeys(sizes):
                # With recompute = except-last, the last micro-batch has functions of its own.
                again = dict.fromkeys(self._recomputes(i) for i in range(m) if sizes[i] == size)
                specs = [tf.TensorSpec((size, *spec.shape[1:]), spec.dtype) for spec in whole]
                received: Sequence[tf.TensorSpec] = specs[:1]
                specs += [tf.TensorSpec((), tf.float64)]  # the divisor, behind the labels
                context = (
                    [tf.TensorSpec((), tf.int64), tf.TensorSpec((size,), tf.int64)]
                    if self._has_dropout
                    else []
                )
                for chunk, (d, _) in zip(self.chunks, self.schedule.location, strict=True):
                    extra = [*(specs[1:] if chunk.is_last else []), *context]
                    reports, share = self._reports and chunk.is_last, size / len(x)
                    work = functools.partial(
                        chunk.trace, received, extra, self._micro_batch_loss, reports, share
                    )
                    for recomputed in again:
                        layers = self._recomputed_layers if recomputed else None
                        functions = self.on_stage(d, functools.partial(work, layers))
                        found.setdefault((size, recomputed), []).append(functions)
                    # What this chunk hands on is what the next one is traced for.
                    received = functions.handed_on
            kinds = [(sizes[i], self._recomputes(i)) for i in range(m)]
            by_chunk = [[found[kind][k] for kind in kinds] for k in range(len(self.chunks))]
            masks = (
                {
                    size: self._parts_for_mask(found[size, again])
                    for size, again in dict.fromkeys(kinds)
                }
                if self._is_masked
                else {}
            )
            self._traced[key] = Traced(by_chunk, masks, self._traced_divisor(len(x)))
        for chunk, functions in zip(self.chunks, self._traced[key].functions, strict=True):
            chunk.functions = functions
        return self._traced[key]

    def _parts_for_mask(self, traced: Sequence[StageFunctions]) -> list[tuple[Any, list[bool]]]:
        """By chunk: a function for what of its output the predictions' mask depends on, and of its
        input it takes.

        Where a mask depends on the tokens alone, as an Embedding's, nothing else is computed.
        """
        # From the last chunk backwards: what one needs of its input is wanted of the one before.
        parts: list[tuple[Any, list[bool]]] = []
        wanted = [False, True]  # of the last output: the mask alone
        for (d, _), functions in reversed(list(zip(self.schedule.location, traced, strict=True))):
            function, wanted = self.on_stage(d, functools.partial(functions.forward_part, wanted))
            parts.insert(0, (function, wanted))
        return parts

    def _collect_variables(self) -> None:
        for d, stage in enumerate(self.stages):
            self.on_stage(
                d, lambda stage=stage: [chunk.collect_variables() for chunk in stage.chunks]
            )
        known = self.optimizer._trainable_variables_indices if self.optimizer.built else None
        if known is not None and any(
            self.optimizer._var_key(master) not in known for master in self._masters
        ):
            raise ValueError("the optimizer was built for other weights; expected a new one")

    def _recomputes(self, micro_batch: int) -> bool:
        return recomputes(self.recompute, micro_batch, self.schedule.num_micro_batches)

    @property
    def _recomputed_layers(self) -> int:
        """In a piece; 0 for the whole chunk."""
        return (
            int(self.recompute.removeprefix("every-")) if self.recompute.startswith("every-") else 0
        )

    @property
    def _has_dropout(self) -> bool:
        return self.spec is not None and self.spec.dropout > 0

    def _micro_batch_loss(self, prediction: tf.Tensor, *labels: tf.Tensor) -> tf.Tensor:
        """As `summed_loss`, while the last stage is traced and first meets a prediction."""
        self._understand_loss(prediction, *self._sample)
        return self.summed_loss(prediction, *labels)

    def _understand_loss(
        self, prediction: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> BatchLoss:
        """Find how the loss goes over micro-batches, from labels of a real mini-batch and what a
        prediction is like, and keep it.
        """
        self._prediction = tf.TensorSpec(prediction.shape, prediction.dtype)
        with tf.init_scope():
            pieces = self.schedule.num_micro_batches
            found = batch_loss(self._compile_loss, y, self._prediction, sample_weight, pieces)
        self._loss = found
        return found

    def _traced_divisor(self, batch_size: int) -> Callable[..., tf.Tensor] | None:
        if self._loss is None:  # the last chunk has been traced, if it is here
            return None
        loss, like = self._loss, self._prediction

        def divisor(mask: tf.Tensor | None, *labels: tf.Tensor) -> tf.Tensor:
            # Only its shape and its mask are read: no prediction is known yet.
            prediction = tf.zeros((batch_size, *like.shape[1:]), like.dtype)
            return loss.divisor(labels[0], with_mask(prediction, mask), *labels[1:])

        traced: Callable[..., tf.Tensor] = tf.function(divisor, autograph=False)
        return traced

    def _divisor(self, traced: Traced, x: tf.Tensor, labels: Sequence[tf.Tensor]) -> float:
        """What the sum of a mini-batch's losses is divided by."""
        assert traced.divisor is not None
        return float(traced.divisor(self._prediction_mask(traced, x), *labels))

    def _prediction_mask(self, traced: Traced, x: tf.Tensor) -> np.ndarray | None:
        """The whole mini-batch: its loss is a mean over what counts, known before any backward."""
        if not self._is_masked:
            return None
        masks = []
        for piece in tf.split(x, piece_sizes(len(x), self.schedule.num_micro_batches)):
            parts = traced.mask_parts[len(piece)]
            handed = [piece] if parts[0][1][0] else []  # a mask may depend on no data at all
            for (d, _), (function, _) in zip(self.schedule.location, parts, strict=True):
                handed = self.on_stage(
                    d, lambda f=function, given=handed: f(*(tf.identity(t) for t in given))
                )
            masks.append(handed[0].numpy())
        return np.concatenate(masks)
