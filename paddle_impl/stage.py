"""One device's part of the pipeline: `Stage` computes, `Channel` moves tensors between the
processes of the stages.

F runs the chunk and keeps input and output for the backward, B and BW run Paddle's autograd from
the output, and what B leaves of the weight gradients (`paddle_impl.backward`) W adds later. A
product is added to its weight's gradient when its W or BW runs, so schedules that keep the
micro-batches' order give the same bits. Where a micro-batch is recomputed
(`paddle_impl.recompute`), autograd runs each piece's forward again inside B or BW.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import paddle
from paddle import Tensor, nn

from common.runtime.decode import Extension
from common.runtime.executor import Message, sent_by
from common.runtime.held import HeldActivations
from common.runtime.mode import Mode
from common.schedule.action import Schedule
from common.spec.data import Batch
from common.spec.dropout_masks import step_key
from common.spec.run import RunConfig
from paddle_impl.backward import Forward, Waiting, backward, backward_input, backward_weight
from paddle_impl.cache import Cache
from paddle_impl.dropout import DropoutContext
from paddle_impl.groups import receive, send
from paddle_impl.held import SavedTensors, memory_bytes, saved_tensors
from paddle_impl.layers import Head, summed_loss
from paddle_impl.recompute import recompute
from paddle_impl.shards import WHOLE, Shards
from paddle_impl.weights import NamedParameter


class Stage:
    """The model chunks of one device (`common.runtime.executor.Stage`), for one mini-batch after
    another.

    `chunks` are the units of each chunk, `parts` their names, `named` their parameters; the stage
    that holds the head computes the loss. `replica` is the one whose micro-batches go through here,
    `shards` what it shares with others.
    Differs: the units come from fleet's PipelineLayer, and `context` is the one that they share.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Sequence[Sequence[str]],
        chunks: Sequence[Sequence[nn.Layer]],
        named: Sequence[Sequence[NamedParameter]],
        context: DropoutContext,
        replica: int = 0,
        shards: Shards = WHOLE,
    ) -> None:
        self.config = config
        self._replica = replica
        self.shards = shards
        self.first = replica * config.train.micro_batches
        """The number of its first micro-batch among those of all replicas."""
        self.chunks = [
            list(zip(part, units, strict=True)) for part, units in zip(parts, chunks, strict=True)
        ]
        """The units of each chunk, by name."""
        self._context = context
        self.named_by_chunk = named
        self.named = [item for chunk in named for item in chunk]
        self.in_flight: dict[tuple[int, int], Forward] = {}
        """By (micro-batch, chunk): forward done, B not yet."""
        self.waiting: dict[tuple[int, int], Waiting] = {}
        """By (micro-batch, chunk): B done, W not yet."""
        self.held = HeldActivations(len(chunks), self._kind)
        self._measured: set[tuple[int, bool, int]] = set()
        """(chunk, kind of micro-batch) whose bytes `held` knows."""
        self.outputs: dict[tuple[str, int], Tensor] = {}
        """By (unit, micro-batch), where the mode keeps them."""
        self._caches: dict[tuple[int, int], Cache] = {}
        """By (group, chunk), while text is generated."""

    def begin(self, batch: Batch, mode: Mode) -> None:
        """Make ready for a pass over `batch`; a training pass starts without gradients."""
        train = self.config.train
        # What is predicted goes through every replica, so that each has all of it.
        share = (0, 1) if mode is Mode.PREDICT else (self._replica, self.config.replicas)
        pieces = batch.share(*share, train.micro_batches)
        self._mode = mode
        self._num_tokens = batch.num_tokens
        self._key = step_key(train.seed, batch.step) if mode.has_dropout else None
        # Differs: on every rank, since those in the middle take the messages' shapes from them.
        self.tokens = [paddle.to_tensor(piece.inputs) for piece in pieces]  # (b, S) each
        self.targets = [paddle.to_tensor(piece.targets) for piece in pieces]  # (b, S) each
        self._samples = [piece.samples for piece in pieces]  # (b,) each
        self._losses: list[Tensor] = []
        self.in_flight.clear()
        self.waiting.clear()
        self.outputs = {}
        if mode is Mode.TRAIN:
            for item in self.named:
                item.parameter.clear_gradient(set_to_zero=False)

    def _kind(self, micro_batch: int) -> tuple[bool, int]:
        """What decides how much a micro-batch holds: recomputed or not, and its sequences."""
        return self.config.recomputes(micro_batch), len(self.tokens[micro_batch])

    def losses(self) -> list[float]:
        """Return each micro-batch's share of the mean loss; empty without the head, and in all
        shards but the first.
        """
        return [loss.item() for loss in self._losses] if self.shards.shard == 0 else []

    def prepare(self, micro_batch: int) -> None:
        """Make the dropout masks of the coming forward those of `micro_batch`."""
        self._context.step_key, self._context.samples = self._key, self._samples[micro_batch]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the micro-batch's share of the mean loss, also kept for `losses`; for fleet's own
        schedule.
        """
        loss = summed_loss(logits, targets, self._num_tokens)
        self._losses.append(loss.detach())
        return loss

    def _run(self, micro_batch: int, units: Sequence[tuple[str, nn.Layer]], x: Tensor) -> Tensor:
        """Some of a chunk's units, one after another; after the head the micro-batch's share of the
        mean loss.
        """
        self.prepare(micro_batch)
        for name, unit in units:
            x = unit(x)
            if self._mode.keeps(name):
                self.outputs[name, micro_batch] = self.shards.whole(name, x)
            if isinstance(unit, Head) and self._mode is not Mode.PREDICT:
                own = [self.shards] if self.shards.columns else []  # logits of some tokens
                x = summed_loss(x, self.targets[micro_batch], self._num_tokens, *own)
        return x

    def forward(self, micro_batch: int, chunk: int, x: Tensor | None) -> Tensor | None:
        """Run the chunk on `x` (b, S, D), or on the micro-batch's tokens where there is none."""
        training = self._mode is Mode.TRAIN
        recomputes = training and self.config.recomputes(micro_batch)
        measures = training and (chunk, *self._kind(micro_batch)) not in self._measured
        looks: AbstractContextManager[SavedTensors | None] = nullcontext()
        if measures:
            looks = saved_tensors()
        with paddle.set_grad_enabled(training), looks as saved:
            if x is not None:
                x.stop_gradient = not training  # a leaf, whose gradient B sends on
            y = self.tokens[micro_batch] if x is None else x
            for units in self._pieces(chunk, recomputes):
                run = partial(self._run, micro_batch, units)
                y = recompute(run, y) if recomputes else run(y)
        has_loss = isinstance(self.chunks[chunk][-1][1], Head)
        if has_loss:
            self._losses.append(y.detach())
        result = None if has_loss else y.detach()
        if training:
            if not has_loss:
                # The backward of a unit's last operation needs its inputs, not this. What is sent
                # has the memory for as long as it needs it.
                y._clear_dataptr()
            self.in_flight[micro_batch, chunk] = Forward(x, y)
            if saved is not None:
                weights = [item.parameter for item in self.named]
                kept = memory_bytes(saved.kept(), [*weights, *self.tokens, *self.targets])
                self.held.bytes_of(micro_batch)[chunk] = kept
                self._measured.add((chunk, *self._kind(micro_batch)))
            self.held.note(self.in_flight, self.waiting)
        return result

    def _pieces(self, chunk: int, recomputes: bool) -> list[list[tuple[str, nn.Layer]]]:
        """The chunk's units as they are recomputed: so many at a time, or all at once."""
        units = self.chunks[chunk]
        size = (self.config.recomputed_units if recomputes else 0) or len(units)
        return [units[start : start + size] for start in range(0, len(units), size)]

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        """B and W at once."""
        return backward(self.in_flight.pop((micro_batch, chunk)), gradient)

    def backward_input(
        self, micro_batch: int, chunk: int, gradient: Tensor | None
    ) -> Tensor | None:
        """B: from the output's gradient (b, S, D), None for the loss, to that of the input, None
        for tokens.
        """
        saved = self.in_flight.pop((micro_batch, chunk))
        result, self.waiting[micro_batch, chunk] = backward_input(saved, gradient)
        sizes = self.held.waiting_bytes_of(micro_batch)
        if not sizes[chunk]:
            # Each product holds the layer's input, its weight, its output's gradient.
            kept = [
                tensor for product in self.waiting[micro_batch, chunk] for tensor in product.args
            ]
            sizes[chunk] = memory_bytes(kept, [item.parameter for item in self.named])
        self.held.note(self.in_flight, self.waiting)
        return result

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        """W: adds the products that B left over to the weight gradients."""
        backward_weight(self.waiting.pop((micro_batch, chunk)))

    def begin_decoding(self) -> None:
        """Make ready for new texts."""
        self._caches = {}
        self._context.step_key = None  # no dropout

    @paddle.no_grad()
    def extend(self, group: int, chunk: int, extension: Extension, x: Tensor | None) -> Tensor:
        """Run the chunk on new positions alone (`common.runtime.decode.Stage`)."""
        if extension.rows is None:
            self._caches[group, chunk] = Cache()
        cache = self._caches[group, chunk]
        if extension.rows is not None:
            cache.keep(extension.rows)
        y = paddle.to_tensor(extension.tokens) if x is None else x
        for name, unit in self.chunks[chunk]:
            y = self.shards.whole(name, unit(y, cache))  # (b, t, D), or the head's logits (b, V)
        cache.length += extension.tokens.shape[1]
        return y


class Channel:
    """Moves tensors between the processes of a pipeline, by Paddle's process groups; made anew for
    every pass.

    Messages carry no address: a pair of processes exchanges them in order, and the order in which a
    device sends is written in the schedule. One that comes before it is asked for is kept. They
    carry no shape either: `shapes` has it, (b, S, D), by micro-batch.

    Differs: neither side moves a tensor of the other's. The receiver makes one on its own device
    and has the sender's bytes put into it.
    """

    def __init__(
        self, schedule: Schedule, device: int, shapes: Sequence[Sequence[int]], dtype: str
    ) -> None:
        self._device, self._shapes, self._dtype = device, shapes, dtype
        self._coming = {
            sender: deque(message for message, to in sent_by(schedule, sender) if to == device)
            for sender in range(schedule.num_devices)
            if sender != device
        }
        self._arrived: dict[Message, Tensor] = {}

    def send(self, message: Message, tensor: Tensor, device: int) -> None:
        if device == self._device:  # where a V turns
            self._arrived[message] = tensor
        else:
            send(tensor, device)

    def receive(self, message: Message, device: int) -> Tensor:
        """Raises ConnectionError if the other process ends, KeyError for what `device` does not
        send.
        """
        while message not in self._arrived:
            if not self._coming.get(device):
                raise KeyError(f"device {device} sends no {message}")
            coming = self._coming[device].popleft()
            # Zeros, since what `empty` finds stops a run with FLAGS_check_nan_inf.
            tensor = paddle.zeros(self._shapes[coming.micro_batch], self._dtype)
            receive(tensor, device)
            self._arrived[coming] = tensor
        return self._arrived.pop(message)
