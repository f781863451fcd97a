"""One device's part of the pipeline: `Stage` computes, `Channel` hands tensors on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from common.runtime.decode import Extension
from common.runtime.executor import Message
from common.runtime.held import HeldActivations
from common.runtime.mailbox import Mailbox
from common.runtime.mode import Mode
from common.spec.data import Batch, MicroBatch
from common.spec.dropout_masks import step_key
from common.spec.run import RunConfig
from torch_impl.backward import Forward, Waiting, backward, backward_input, backward_weight
from torch_impl.cache import Cache
from torch_impl.dropout import DropoutContext, ElementHashes
from torch_impl.gradients import gradient_of
from torch_impl.held import memory_bytes, saved_tensors
from torch_impl.layers import constants, summed_loss
from torch_impl.shards import WHOLE, Shards, parallel_loss
from torch_impl.streams import CopyStreams
from torch_impl.taps import Chunk


@dataclass(slots=True)
class Pass:
    """A mini-batch on its way through a stage, cut into micro-batches."""

    mode: Mode
    num_tokens: int
    sequences: list[int]
    rows: slice
    """This replica's, of those of the mini-batch."""
    tokens: list[Tensor]  # (b, S) each; none where the embedding is elsewhere
    targets: list[Tensor]  # (b, S) each; none where the head is elsewhere
    contexts: list[DropoutContext | None]
    losses: list[Tensor]  # scalars, in the order of the schedule


class Stage:
    """The model chunks of one device (`common.runtime.executor.Stage`), a mini-batch at a time.

    `parts` names the units of each chunk; the stage that holds the head computes the loss.
    `replica` is the one whose micro-batches go through here, `shards` what it shares with others.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Sequence[Sequence[str]],
        device: torch.device,
        replica: int = 0,
        shards: Shards = WHOLE,
    ) -> None:
        self.config = config
        self.device = device
        self._replica = replica
        self.shards = shards
        self.chunks = [Chunk(config, part, device, shards) for part in parts]
        self.named = [item for chunk in self.chunks for item in chunk.named]
        self._gradients = [gradient_of(item.parameter) for item in self.named]
        self.in_flight: dict[tuple[int, int], Forward] = {}
        """By (micro-batch, chunk): forward done, B not yet."""
        self.waiting: dict[tuple[int, int], Waiting] = {}
        """By (micro-batch, chunk): B done, W not yet."""
        self.held = HeldActivations(len(self.chunks), self._kind)
        self._elements = ElementHashes()
        self._generator = (
            torch.Generator(device) if config.model.dropout_masks == "native" else None
        )
        self.outputs: dict[tuple[str, int], Tensor] = {}
        """By (unit, micro-batch), where the mode keeps them."""
        self._caches: dict[tuple[int, int], Cache] = {}
        """By (group, chunk), while text is generated."""

    def begin(self, batch: Batch, mode: Mode, pieces: Sequence[MicroBatch] | None = None) -> None:
        """Make ready for a pass over `batch`; a training pass starts with zero gradients.

        `pieces` are its micro-batches that go through here; by default those of this replica.
        """
        # What is predicted goes through every replica, so that each has all of it.
        share = (0, 1) if mode is Mode.PREDICT else (self._replica, self.config.replicas)
        pieces = pieces or batch.share(*share, self.config.train.micro_batches)
        self._count = len(pieces)
        samples = [piece.samples for piece in pieces]
        rows = slice(int(samples[0][0]), int(samples[-1][-1]) + 1)
        units = [unit for chunk in self.chunks for unit in chunk.part]
        self.now = Pass(
            mode,
            batch.num_tokens,
            [len(piece) for piece in samples],
            rows,
            self._micro_batches(batch.inputs[rows]) if "embedding" in units else [],
            self._micro_batches(batch.targets[rows]) if "head" in units else [],
            self._contexts(batch, samples)
            if mode.has_dropout and self.config.model.dropout
            else [None] * len(samples),
            [],
        )
        self.in_flight.clear()
        self.waiting.clear()
        self.outputs = {}
        for chunk in self.chunks:
            chunk.take_taps()  # left by a forward that failed
            chunk.cast_weights()
        if mode is Mode.TRAIN:
            torch._foreach_zero_(self._gradients)

    def _micro_batches(self, array: NDArray[Any]) -> list[Tensor]:
        """The rows (B, ...) on the stage's device, cut into micro-batches, in one unwaited copy."""
        whole = torch.from_numpy(array)
        if self.device.type == "cuda":
            whole = whole.pin_memory().to(self.device, non_blocking=True)
        return list(whole.tensor_split(self._count))

    def _contexts(
        self, batch: Batch, samples: Sequence[NDArray[Any]]
    ) -> list[DropoutContext | None]:
        key = step_key(self.config.train.seed, batch.step)
        moved = self._micro_batches(np.concatenate(samples))
        return [
            self._dropout(key, rows, int(piece[0]))
            for rows, piece in zip(moved, samples, strict=True)
        ]

    def _dropout(self, key: int, samples: Tensor, first_sample: int) -> DropoutContext:
        return DropoutContext(key, samples, first_sample, self._elements, self._generator)

    def _kind(self, micro_batch: int) -> tuple[bool, int]:
        """What decides how much a micro-batch holds: recomputed or not, and its sequences."""
        return self.config.recomputes(micro_batch), self.now.sequences[micro_batch]

    def losses(self) -> list[float]:
        """Return each micro-batch's share of the mean loss; none but with the head, in shard 0."""
        counts = self.now.losses and self.shards.shard == 0
        return torch.stack(self.now.losses).tolist() if counts else []

    def forward(self, micro_batch: int, chunk: int, x: Tensor | None) -> Tensor | None:
        """Run the chunk on `x` (b, S, D), or on the micro-batch's tokens where there is none."""
        module, now = self.chunks[chunk], self.now
        training, has_head = now.mode is Mode.TRAIN, module.part[-1] == "head"
        # Measured once per kind of micro-batch: the hooks that look at each tensor cost time.
        sizes = self.held.bytes_of(micro_batch)
        measures = training and not sizes[chunk]
        saved: list[Tensor] = []
        again: list[list[Tensor]] = []
        with torch.set_grad_enabled(training), saved_tensors(saved) if measures else nullcontext():
            # Here the stage's graph begins: `x` comes without one, and B asks for its gradient.
            y = now.tokens[micro_batch] if x is None else x.requires_grad_(training)
            if training and self.config.recomputes(micro_batch):
                for piece in module.recomputed_pieces:
                    again.append([])
                    y = module.recomputed(
                        partial(self._run, micro_batch, module, piece), y, again[-1]
                    )
            else:
                y = self._run(micro_batch, module, slice(None), y)
        if has_head and now.mode is not Mode.PREDICT:
            now.losses.append(y.detach())
        if training:
            # The edge keeps the graph alive without `y`, which belongs to the next stage.
            self.in_flight[micro_batch, chunk] = Forward(
                x, get_gradient_edge(y), module.take_taps(), again, module.direct
            )
            if measures:
                kept = [*module.parameters(), *module.buffers(), *constants()]
                sizes[chunk] = memory_bytes(saved, [*kept, *now.tokens, *now.targets])
            self.held.note(self.in_flight, self.waiting)
        return None if has_head else y.detach()

    def _run(self, micro_batch: int, module: Chunk, piece: slice, x: Tensor) -> Tensor:
        """The units of a piece of a chunk; the loss is a part of the head's."""
        now = self.now
        for name, unit in zip(module.part[piece], module.units[piece], strict=True):
            x = unit(x, now.contexts[micro_batch])  # (b, S, D), or the head's logits (b, S, V)
            if now.mode.keeps(name):
                self.outputs[name, micro_batch] = self.shards.whole(name, x)
            if name == "head" and now.mode is not Mode.PREDICT:
                wanted = now.targets[micro_batch], now.num_tokens
                x = (
                    parallel_loss(x, *wanted, self.shards)
                    if self.shards.columns
                    else summed_loss(x, *wanted)
                )
        return x

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        """B and W at once."""
        return backward(self.in_flight.pop((micro_batch, chunk)), gradient)

    def backward_input(
        self, micro_batch: int, chunk: int, gradient: Tensor | None
    ) -> Tensor | None:
        """B: from the output's gradient (b, S, D) to the input's; None for the loss, for tokens."""
        saved = self.in_flight.pop((micro_batch, chunk))
        result, self.waiting[micro_batch, chunk] = backward_input(saved, gradient)
        sizes = self.held.waiting_bytes_of(micro_batch)
        if not sizes[chunk]:
            kept = [tensor for _, *pair in self.waiting[micro_batch, chunk] for tensor in pair]
            sizes[chunk] = memory_bytes(kept, self.now.tokens)
        self.held.note(self.in_flight, self.waiting)
        return result

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        """W: adds the products that B left over to the weight gradients."""
        backward_weight(self.waiting.pop((micro_batch, chunk)))

    def begin_decoding(self) -> None:
        """Make ready for new texts."""
        self._caches = {}
        for chunk in self.chunks:
            chunk.cast_weights()

    @torch.no_grad()
    def extend(self, group: int, chunk: int, extension: Extension, x: Tensor | None) -> Tensor:
        """Run the chunk on new positions alone (`common.runtime.decode.Stage`)."""
        if extension.rows is None:
            self._caches[group, chunk] = Cache()
        cache = self._caches[group, chunk]
        if extension.rows is not None:
            cache.keep(extension.rows)
        y = torch.from_numpy(extension.tokens).to(self.device) if x is None else x
        for unit in self.chunks[chunk].units:
            y = unit(y, None, cache)  # (b, t, D), or the head's logits (b, V)
        cache.length += extension.tokens.shape[1]
        return y


class Channel(Mailbox):
    """Hands tensors between the threads of one process; made anew for every pass.

    A tensor moves to its receiver's device in `send`, in plain sight. Sends never wait. On GPUs
    neither does `receive`: events put the copy after the sender's work and before the receiver's.
    """

    def __init__(self, devices: Sequence[torch.device], streams: CopyStreams) -> None:
        super().__init__()
        self._devices, self._streams = devices, streams

    def send(self, message: Message, tensor: Tensor, device: int) -> None:
        on_gpu = isinstance(tensor, Tensor) and tensor.is_cuda  # shards send other things too
        moved, arrived = self._move(tensor, self._devices[device]) if on_gpu else (tensor, None)
        self.put(message, (moved, arrived))

    def _move(self, tensor: Tensor, to: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """Queues the copy; the event says when it is done."""
        here = torch.cuda.current_stream(tensor.device)
        if to == tensor.device:
            return tensor, here.record_event()
        leaving, arriving = self._streams[tensor.device, to]
        # A copy between GPUs runs in the current stream of both; neither may be one that computes.
        leaving.wait_stream(here)
        with torch.cuda.stream(arriving), torch.cuda.stream(leaving):
            moved = tensor.to(to, non_blocking=True)
        tensor.record_stream(leaving)
        return moved, arriving.record_event()

    def receive(self, message: Message, device: int) -> Tensor:
        """Raises PipelineStopped if a stage fails before the tensor is there."""
        tensor: Tensor  # (b, S, D)
        tensor, arrived = self.take(message)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
            tensor.record_stream(torch.cuda.current_stream())  # its memory came from another stream
        return tensor
