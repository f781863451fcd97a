"""What a PyTorch user would write without this project: a plain training loop, and PyTorch's own
pipeline.

Both train the same model, from the same weights, on the same batches, with the same optimizer and
threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from common.oracle.reference import clip_scale, global_norm
from common.runtime.engine import Arrays
from common.runtime.executor import Event
from common.runtime.memory import peak_resident_bytes
from common.schedule.action import Action, Op
from common.schedule.generators import make_schedule
from common.spec.data import Batch
from common.spec.dropout_masks import step_key
from common.spec.parameters import TOKEN_EMBEDDING, TensorKey, parameter_shapes, unit_names
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from torch_impl import devices, graphs
from torch_impl.dropout import DropoutContext, ElementHashes
from torch_impl.layers import build_unit, summed_loss
from torch_impl.optimizer import StageOptimizer
from torch_impl.weights import (
    NamedParameter,
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
    to_array,
)


class Units(nn.Module):
    """Consecutive units of the model: all of them, or those of a stage."""

    def __init__(self, config: RunConfig, part: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.part = part
        self.units = nn.ModuleList(
            build_unit(config.model, name, devices.fused_attention(config)) for name in part
        )
        self.to(device=device, dtype=getattr(torch, config.train.dtype))
        self.step_key: int | None = None
        """Of the dropout masks; None in evaluation."""
        self.outputs: list[tuple[str, Tensor]] | None = None
        """A list here makes `forward` keep every unit's output."""
        self._elements = ElementHashes()
        self._generator = (
            torch.Generator(device) if config.model.dropout_masks == "native" else None
        )

    def forward(self, x: Tensor, samples: Tensor) -> Tensor:
        context = None if self.step_key is None else self._dropout(self.step_key, samples)
        for name, unit in zip(self.part, self.units, strict=True):
            x = unit(x, context)
            if self.outputs is not None:
                self.outputs.append((name, x))
        return x

    def _dropout(self, key: int, samples: Tensor) -> DropoutContext:
        first = 0 if self._generator is None else int(samples[0])
        return DropoutContext(key, samples, first, self._elements, self._generator)


class Peer:
    """What both share: parameters, optimizer, what the harness asks
    (`common.runtime.engine.Engine`).
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        rank: int,
        units: Sequence[Units],
        named: list[NamedParameter],
    ) -> None:
        self.config, self.devices = config, (rank,)
        self._device, self._units, self._named = device, units, named
        for item in named:
            item.parameter.grad = torch.zeros_like(item.parameter)
        self._events: list[Event] = []
        self._reset_optimizer()

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, weights)
        for item in self._named:
            item.parameter.grad.zero_()
        self._reset_optimizer()

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        raise ValueError(
            f"executor = {self.config.executor} does not run units alone; expected table"
        )

    def optimizer_state(self) -> Arrays:
        return self._optimizer.state()

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        self._optimizer.load_state(state, steps_done)

    def weights(self) -> Arrays:
        return self._in_order(export_weights(self._named))

    def gradients(self) -> Arrays:
        """As the protocol says, until `apply_gradients` clips them in place."""
        return self._in_order(export_gradients(self._named))

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        load_gradients(self._named, gradients)

    def events(self) -> dict[int, list[Event]]:
        return {self.devices[0]: self._events}

    def environment(self) -> dict[str, Any]:
        said = devices.environment([self._device]) | devices.best_track(self.config)
        return said | graphs.environment(self.config, self._device)

    def peak_memory_bytes(self) -> dict[int, int]:
        if self._device.type == "cuda":
            return {self.devices[0]: torch.cuda.max_memory_allocated(self._device)}
        return {self.devices[0]: peak_resident_bytes()}

    def held_bytes_peak(self) -> dict[int, int]:
        return {}

    def in_flight_peak(self) -> dict[int, int]:
        return {}

    def close(self) -> None:
        devices.free_workspaces([self._device])

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, S), targets (B, S) and sample indices (B,) of the whole mini-batch."""
        whole = batch.micro_batches(1)[0]
        tokens, targets, samples = map(
            torch.from_numpy, (whole.inputs, whole.targets, whole.samples)
        )
        return tokens.to(self._device), targets.to(self._device), samples.to(self._device)

    def _set_step_key(self, batch: Batch, training: bool) -> None:
        for units in self._units:
            units.step_key = step_key(self.config.train.seed, batch.step) if training else None

    def _reset_optimizer(self) -> None:
        self._optimizer = StageOptimizer(self.config.train, self._named)

    def _in_order(self, found: Arrays) -> Arrays:
        return {name: found[name] for name in parameter_shapes(self.config.model) if name in found}


class PlainEngine(Peer):
    """The loop of every tutorial: the whole model, the whole mini-batch at once, `loss.backward()`."""  # noqa: E501

    def __init__(self, config: RunConfig) -> None:
        device = devices.stage_devices(1, config.device)[0]
        devices.prepare_thread(device, devices.threads_per_stage(1, config.threads))
        part = unit_names(config.model)
        self.model = Units(config, part, device)
        named = named_parameters(part, list(self.model.units), config.model.tied_head)
        if config.model.tied_head:  # as its users tie it: one parameter, used twice
            self.model.units[-1].output.weight = self.model.units[0].token.weight
            named = [item for item in named if not item.is_copy]
        super().__init__(config, device, 0, [self.model], named)

    def forward_backward(self, batch: Batch) -> float:
        self._set_step_key(batch, training=True)
        torch._foreach_zero_([item.parameter.grad for item in self._named])
        loss = self._loss(batch)
        loss.backward()
        return loss.item()

    def apply_gradients(self, step: int) -> float:
        norm = global_norm(self._optimizer.squared_norms())
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        self._set_step_key(batch, training=False)
        return self._loss(batch).item()

    @torch.no_grad()
    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        self._set_step_key(batch, training=True)
        self.model.outputs = []
        self._loss(batch)
        found, self.model.outputs = self.model.outputs, None
        return {
            TensorKey(batch.step, "forward", 0, i, unit, "output"): piece.numpy()
            for unit, output in found
            for i, piece in enumerate(output.cpu().tensor_split(self.config.train.micro_batches))
        }

    @torch.no_grad()
    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        batch = Batch(0, inputs, np.zeros_like(inputs))
        self._set_step_key(batch, training=False)
        tokens, _, samples = self._tensors(batch)
        return to_array(self.model(tokens, samples))

    def _loss(self, batch: Batch) -> Tensor:
        tokens, targets, samples = self._tensors(batch)
        return summed_loss(self.model(tokens, samples), targets, batch.num_tokens)


SCHEDULES: dict[str, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb-h1": ScheduleInterleavedZeroBubble,
    "zb-v": ScheduleZBVZeroBubble,
}
"""PyTorch's schedule for each of our names. With one stage per rank its interleaved zero-bubble one
is ZB-H1.
"""


class RecordingStage(PipelineStage):
    """`PipelineStage`, unchanged but for a record of what it did when."""

    def __init__(
        self,
        units: Units,
        index: int,
        count: int,
        device: torch.device,
        chunk: int,
        events: list[Event],
    ) -> None:
        super().__init__(units, index, count, device)
        self._chunk, self._events = chunk, events

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        self._record(Op.F, fwd_chunk_id, start)
        return result

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        if self.has_backward:
            self._record(Op.BW if options.get("full_backward", True) else Op.B, bwd_chunk_id, start)
        return result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **options)
        self._record(Op.W, bwd_chunk_id, start)

    def _record(self, op: Op, micro_batch: int, start: float) -> None:
        ready = self._events[-1].end_seconds if self._events else start
        self._events.append(
            Event(Action(op, micro_batch, self._chunk), ready, start, time.perf_counter())
        )


class PipeliningEngine(Peer):
    """`torch.distributed.pipelining`: one process per stage, messages over gloo (CPU) or NCCL."""

    def __init__(self, config: RunConfig) -> None:
        if config.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule = {config.schedule}; torch.distributed.pipelining takes "
                f"{', '.join(SCHEDULES)}"
            )
        m = config.train.micro_batches
        ours = make_schedule(config.schedule, config.stages, m, config.chunks)
        rank = distributed.get_rank()
        device = devices.stage_devices(config.stages, config.device)[rank]
        indices = [ours.virtual_stage(rank, chunk) for chunk in range(config.chunks)]
        parts = plan_partition(config).parts
        units = [Units(config, parts[k], device) for k in indices]
        named = [
            item
            for part in units
            for item in named_parameters(part.part, list(part.units), config.model.tied_head)
        ]
        super().__init__(config, device, rank, units, named)
        stages = [
            RecordingStage(part, k, ours.num_virtual_stages, device, chunk, self._events)
            for chunk, (k, part) in enumerate(zip(indices, units, strict=True))
        ]
        kind = SCHEDULES[config.schedule]
        takes_one = kind in (ScheduleGPipe, Schedule1F1B)
        self._schedule = kind(
            stages[0] if takes_one else stages, m, loss_fn=self._micro_batch_loss, scale_grads=False
        )
        self._location = ours.location
        self._is_first, self._is_last = 0 in indices, ours.num_virtual_stages - 1 in indices
        ends = sorted({ours.location[0][0], ours.location[-1][0]})
        self._tied_group = (
            distributed.new_group(ends) if config.model.tied_head and len(ends) == 2 else None
        )

    def forward_backward(self, batch: Batch) -> float:
        self._set_step_key(batch, training=True)
        torch._foreach_zero_([item.parameter.grad for item in self._named])
        self._events.clear()
        self._num_tokens = batch.num_tokens
        tokens, targets, samples = self._tensors(batch)
        losses: list[Tensor] = []
        last = {"target": targets, "losses": losses} if self._is_last else {}
        self._schedule.step(
            *([tokens] if self._is_first else []), samples=samples, return_outputs=False, **last
        )
        self._add_tied_gradients()
        return self._sum_over_ranks([math.fsum(loss.item() for loss in losses)])[0]

    def apply_gradients(self, step: int) -> float:
        names = [item.name for item in self._named if not item.is_copy]
        own = dict(zip(names, self._optimizer.squared_norms(), strict=True))
        squares = self._sum_over_ranks(
            [own.get(name, 0.0) for name in parameter_shapes(self.config.model)]
        )
        norm = global_norm(squares)
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    def evaluate(self, batch: Batch) -> float:
        self._set_step_key(batch, training=False)
        logits, loss = self._forward(batch), 0.0
        if logits is not None:
            loss = summed_loss(logits, self._tensors(batch)[1], batch.num_tokens).item()
        return self._sum_over_ranks([loss])[0]

    @torch.no_grad()
    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        batch = Batch(0, inputs, np.zeros_like(inputs))
        self._set_step_key(batch, training=False)
        logits = self._forward(batch)
        if logits is None:
            logits = self._empty(*inputs.shape, self.config.model.vocab_size)
        distributed.broadcast(logits, src=self._location[-1][0])
        return to_array(logits)

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        self._set_step_key(batch, training=True)
        for units in self._units:
            units.outputs = []
        self._forward(batch)
        found = {}
        for units in self._units:
            for unit, output in units.outputs or ():
                for i, piece in enumerate(
                    output.cpu().tensor_split(self.config.train.micro_batches)
                ):
                    found[TensorKey(batch.step, "forward", self.devices[0], i, unit, "output")] = (
                        piece.numpy()
                    )
            units.outputs = None
        return found

    @torch.no_grad()
    def _forward(self, batch: Batch) -> Tensor | None:
        """The whole mini-batch, stage after stage: the logits, or None where the head is elsewhere.

        (`eval` of PyTorch's ZBV schedule fails.)
        """
        x, _, samples = self._tensors(batch)
        for holder, chunk in self._location[:-1]:
            if holder == self.devices[0]:
                x = self._units[chunk](x, samples)
            else:
                x = self._empty(*batch.inputs.shape, self.config.model.d_model)
            distributed.broadcast(x, src=holder)
        holder, chunk = self._location[-1]
        return self._units[chunk](x, samples) if holder == self.devices[0] else None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._named[0].parameter.dtype, device=self._device)

    def _micro_batch_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(logits, targets, self._num_tokens)

    def _sum_over_ranks(self, numbers: list[float]) -> list[float]:
        """All but one rank have 0 at each place."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        return total.tolist()

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: that of its own use plus that of the head's copy, put in
        both.
        """
        both = [item.parameter.grad for item in self._named if item.name == TOKEN_EMBEDDING]
        if self._tied_group is not None and both:
            distributed.all_reduce(both[0], group=self._tied_group)
        elif len(both) == 2:
            both[1].copy_(both[0].add_(both[1]))


def build_baseline(config: RunConfig) -> Peer:
    """Return the engine for `executor` plain or native. Raises ValueError for what only our own
    executor does.
    """
    if config.recompute != "none":
        raise ValueError(f"recompute = {config.recompute}; executor = {config.executor} takes none")
    if config.train.dtype == "bfloat16":
        raise ValueError(f"dtype = bfloat16; executor = {config.executor} takes float32 or float64")
    return PlainEngine(config) if config.executor == "plain" else PipeliningEngine(config)
