"""A pass that only predicts, for a Keras model's `evaluate` and `predict`, of any batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tf_impl.effects import mask_of, with_mask
from tf_impl.keras_pipeline.chunk import Chunk, apply_layer


class ForwardOnly:
    """A pass that only predicts: a `common.runtime.executor.Stage`'s forward, without dropout."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        inputs: Sequence[tf.Tensor],
        shares: Sequence[float],
        finish: Callable[[int, tf.Tensor], tf.Tensor],
    ) -> None:
        """`inputs`: the micro-batches, on the first stage; `shares`: their parts of the mini-batch.

        `finish` makes of a prediction what is kept of it.
        """
        self.chunks = chunks
        self._inputs, self._finish = inputs, finish
        self._shares = [tf.constant(share, tf.float64) for share in shares]
        self.predictions: dict[int, tf.Tensor] = {}
        self.layer_losses: list[tf.Tensor] = []
        """What the layers add to the loss of the mini-batch."""

    def forward(
        self, micro_batch: int, chunk: int, x: Sequence[tf.Tensor] | None
    ) -> list[tf.Tensor] | None:
        """As `Stage.forward`."""
        part = self.chunks[chunk]
        # Traced for any batch size, so a micro-batch of another size costs no new trace.
        received, *masks = [self._inputs[micro_batch]] if x is None else x
        y, mask, losses = part.evaluate(received, *(masks or [None]), self._shares[micro_batch])
        if losses is not None:
            self.layer_losses.append(losses)
        if not part.is_last:
            return [y] if mask is None else [y, mask]
        self.predictions[micro_batch] = self._finish(micro_batch, with_mask(y, mask))
        return None


class Recorded:
    """A pass that keeps every layer's output, with the dropout of a training step; layers are
    called one by one, not as a traced function.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        inputs: Sequence[tf.Tensor],
        contexts: Sequence[tuple[int, np.ndarray]],
    ) -> None:
        """`inputs`: the micro-batches; `contexts`: their keys and samples, or nothing."""
        self.chunks, self._inputs, self._contexts = chunks, inputs, contexts
        self.outputs: dict[tuple[int, str], tf.Tensor] = {}
        """By micro-batch and the layer's name."""

    def forward(
        self, micro_batch: int, chunk: int, x: Sequence[tf.Tensor] | None
    ) -> list[tf.Tensor] | None:
        """As `Stage.forward`."""
        part = self.chunks[chunk]
        received, *masks = [self._inputs[micro_batch]] if x is None else x
        y = with_mask(tf.identity(received), *(masks or [None]))
        for layer in part.layers:
            context = self._contexts[micro_batch] if self._contexts else ()
            given = [tf.constant(value, tf.int64) for value in context]
            y = apply_layer(layer, y, part._split(given)[1], training=True)
            self.outputs[micro_batch, layer.name] = y
        mask = mask_of(y)
        return None if part.is_last else [y] if mask is None else [y, mask]


def concatenated(pieces: Sequence[tf.Tensor]) -> tf.Tensor:
    """Micro-batches put together again, with their masks if they have any."""
    masks = [mask_of(piece) for piece in pieces]
    return with_mask(tf.concat(pieces, 0), None if masks[0] is None else tf.concat(masks, 0))
