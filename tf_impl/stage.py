"""One device's part of the pipeline: `Stage` computes, `Channel` hands tensors on.

A stage calls the functions made of its graph. Between the calls it holds what they pass on:

    forward(i)          saved tensors of micro-batch i; what    dropped by backward or backward_input
                        pieces start from, where B recomputes
    backward_input(i)   what W needs of them, and of B          dropped by backward_weight
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from common.runtime.decode import Extension
from common.runtime.executor import Message
from common.runtime.held import HeldActivations
from common.runtime.mailbox import Mailbox
from tf_impl.backward import Forward, Waiting, backward, backward_input, backward_weight
from tf_impl.cache import Cache, Held
from tf_impl.cut_graphs.functions import StageFunctions
from tf_impl.device_shards import parts_of
from tf_impl.effects import with_mask
from tf_impl.keras_pipeline.chunk import Chunk
from tf_impl.layers import Block


class Stage:
    """The chunks of one device, as `common.runtime.executor.run_stage` drives them."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.held = HeldActivations(
            len(chunks), lambda micro_batch: id(self._functions(micro_batch, 0))
        )
        self._caches: dict[tuple[int, int], Cache] = {}
        """By (group, chunk), while text is generated."""
        self._extending: dict[tuple[int, int, bool], Any] = {}
        """By chunk, number of new positions, and whether there are none before."""
        self.begin([], [], [])

    def begin(
        self,
        inputs: Sequence[tf.Tensor],
        labels: Sequence[Sequence[tf.Tensor]],
        contexts: Sequence[Sequence[tf.Tensor]],
    ) -> None:
        """Take a step's micro-batches: inputs (first stage), labels (last) and dropout contexts."""
        self._inputs, self._labels, self._contexts = inputs, labels, contexts
        self.in_flight: dict[tuple[int, int], Forward] = {}
        """By (micro-batch, chunk): forward done, B not yet."""
        self.waiting: dict[tuple[int, int], Waiting] = {}
        """By (micro-batch, chunk): B done, W not yet."""
        self._losses: list[tf.Tensor] = []
        self.layer_losses: list[tf.Tensor] = []
        self.predictions: dict[int, tf.Tensor] = {}

    def losses(self) -> list[float]:
        """Return each micro-batch's share of the loss; empty without the last chunk."""
        return [float(loss) for loss in self._losses]

    def forward(
        self, micro_batch: int, chunk: int, x: Sequence[tf.Tensor] | None
    ) -> list[tf.Tensor] | None:
        """From and to a list: the tensor and, where Keras has given it one, its mask."""
        part, functions = self.chunks[chunk], self._functions(micro_batch, chunk)
        arguments = [self._inputs[micro_batch]] if x is None else list(x)
        if part.is_last:
            arguments += self._labels[micro_batch]
        if self._contexts:
            arguments += self._contexts[micro_batch]
        # arguments: x (b, S) tokens or (b, S, D), its mask if it has one, labels on the last chunk,
        # the dropout context; in the order of the trace's signature.
        y, *results = functions.forward(*arguments)
        reported = dict(zip(functions.reported, results, strict=False))
        self.in_flight[micro_batch, chunk] = Forward(functions, results[len(reported) :])
        self.held.bytes_of(micro_batch)[chunk] = functions.saved_bytes
        self.held.note(self.in_flight, self.waiting)
        if "layer_losses" in reported:
            self.layer_losses.append(reported["layer_losses"])
        mask = reported.get("mask")
        if not part.is_last:
            return [y] if mask is None else [y, mask]
        self._losses.append(y)  # () still on the device: nobody waits for it in a step
        if "prediction" in reported:
            self.predictions[micro_batch] = with_mask(reported["prediction"], mask)
        return None

    def backward(
        self, micro_batch: int, chunk: int, gradient: tf.Tensor | None
    ) -> tf.Tensor | None:
        """B and W at once."""
        return backward(self.in_flight.pop((micro_batch, chunk)), gradient)

    def backward_input(
        self, micro_batch: int, chunk: int, gradient: tf.Tensor | None
    ) -> tf.Tensor | None:
        """B: from the output's gradient (b, S, D) to the input's; None for the loss, for tokens."""
        saved = self.in_flight.pop((micro_batch, chunk))
        result, self.waiting[micro_batch, chunk] = backward_input(saved, gradient)
        self.held.waiting_bytes_of(micro_batch)[chunk] = saved.functions.waiting_bytes
        self.held.note(self.in_flight, self.waiting)
        return result

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        """W: adds what B left over to the weight gradients."""
        backward_weight(self.waiting.pop((micro_batch, chunk)))

    def begin_decoding(self) -> None:
        """Make ready for new texts."""
        self._caches = {}

    def extend(
        self, group: int, chunk: int, extension: Extension, x: tf.Tensor | None
    ) -> tf.Tensor:
        """Run the chunk on new positions alone (`common.runtime.decode.Stage`)."""
        is_new = extension.rows is None
        if is_new:
            self._caches[group, chunk] = Cache()
        cache = self._caches[group, chunk]
        if extension.rows is not None:
            cache.keep(extension.rows)
        given = tf.constant(extension.tokens) if x is None else x
        count = extension.tokens.shape[1]
        length = tf.constant(cache.length, tf.int32)
        y, cache.held = self._extend(chunk, count, is_new)(given, length, cache.held)
        cache.length += count
        return y

    def _extend(self, chunk: int, count: int, is_new: bool) -> Any:
        """What runs a chunk on `count` new positions, traced for any before and any sequences."""
        key = chunk, count, is_new
        if key not in self._extending:
            part = self.chunks[chunk]
            spec, dtype = part.layers[0].spec, part.layers[0].compute_dtype
            x = tf.TensorSpec((None, count, spec.d_model), dtype)
            if part.is_first:
                x = tf.TensorSpec((None, count), tf.int64)
            blocks = [unit for unit in part.layers if isinstance(unit, Block)]
            attentions = [each for block in blocks for each in parts_of(block.attention)]
            held = {}
            for each in () if is_new else attentions:
                shape = None, each.spec.kv_heads, None, spec.d_head  # (B, K, S, E)
                held[each.site] = (tf.TensorSpec(shape, dtype),) * 2

            def extend(x: tf.Tensor, length: tf.Tensor, held: Held) -> tuple[tf.Tensor, Held]:
                cache = Cache(0 if is_new else length, held)
                with tf.device(part.device):
                    for unit in part.layers:
                        x = unit(x, cache=cache)  # (b, t, D), or the head's logits (b, V)
                return x, cache.held

            signature = [x, tf.TensorSpec((), tf.int32), held]
            self._extending[key] = tf.function(extend, signature, autograph=False)
        return self._extending[key]

    def _functions(self, micro_batch: int, chunk: int) -> StageFunctions:
        return self.chunks[chunk].functions[micro_batch]


class Channel(Mailbox):
    """Hands tensors between the threads of one process; made anew for every pass.

    Sends never wait.

    Differs: the receiver moves a tensor to its device, PyTorch's sender does. TensorFlow copies on
    the thread that asks, and waits until the copy is done; a sender that waits could not go on.
    """

    def send(self, message: Message, tensor: Any, device: int) -> None:
        self.put(message, tensor)  # a tensor, or a tensor and its mask

    def receive(self, message: Message, device: int) -> Any:
        """Raises PipelineStopped if a stage fails before the tensor is there."""
        return tf.nest.map_structure(tf.identity, self.take(message))  # on the thread's own device
