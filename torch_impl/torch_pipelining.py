"""PyTorch's own pipeline, `torch.distributed.pipelining`: one process per stage, beside ours.

Differs: Paddle's pipeline is fleet's (`paddle_impl/fleet.py`), TensorFlow has none.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from common.io.edges import write_file
from common.oracle.reference import clip_scale, global_norm
from common.runtime.executor import Event
from common.schedule.action import Action, Op, Schedule
from common.schedule.generators import make_schedule
from common.schedule.pytorch_csv import format_csv
from common.spec.data import Batch
from common.spec.parameters import TOKEN_EMBEDDING, TensorKey, parameter_shapes
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from torch_impl import devices
from torch_impl.baseline import PlainEngine
from torch_impl.gradients import gradient_of
from torch_impl.layers import summed_loss
from torch_impl.units import Units
from torch_impl.weights import named_parameters, to_array

SCHEDULES: dict[str, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zb-h1": ScheduleInterleavedZeroBubble,
    "zb-v": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""PyTorch's schedule for each of our names; interleaved zero-bubble with one stage is ZB-H1."""


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

    # PyTorch calls these three for the actions of its table, whatever the schedule.
    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        self._record(Op.F, fwd_chunk_id, start)
        return result

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        # Without a split it is B and W at once: full_backward, which PyTorch takes as the default.
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        if self.has_backward:
            self._record(Op.BW if options.get("full_backward", True) else Op.B, bwd_chunk_id, start)
        return result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **options)
        self._record(Op.W, bwd_chunk_id, start)

    def _record(self, op: Op, micro_batch: int, start: float) -> None:
        # The action before had ended then; what lies between is the wait for a message.
        ready = self._events[-1].end_seconds if self._events else start
        self._events.append(
            Event(Action(op, micro_batch, self._chunk), ready, start, time.perf_counter())
        )


class PipeliningEngine(PlainEngine):
    """`torch.distributed.pipelining`: one process per stage, messages over gloo (CPU) or NCCL."""

    def __init__(self, config: RunConfig) -> None:
        kind = SCHEDULES.get(config.schedule)
        if kind is None and not config.schedule.startswith("file:"):
            raise ValueError(
                f"schedule = {config.schedule}; torch.distributed.pipelining takes "
                f"{', '.join(SCHEDULES)} or file:PATH"
            )
        m = config.train.micro_batches
        ours = make_schedule(config.schedule, config.stages, m, config.chunks)
        rank = distributed.get_rank()
        device = devices.stage_devices(config.stages, config.device)[rank]
        indices = ours.parts[rank]
        parts = plan_partition(config).parts
        # A stage of PyTorch's is one of our virtual stages: this rank has one for each chunk.
        units = [Units(config, parts[k], device) for k in indices]
        named = [
            item
            for part in units
            for item in named_parameters(part.part, list(part.units), config.model.tied_head)
        ]
        self._place(config, device, rank, units, named)
        self._events: list[Event] = []
        stages = [
            RecordingStage(part, k, ours.num_virtual_stages, device, chunk, self._events)
            for chunk, (k, part) in enumerate(zip(indices, units, strict=True))
        ]
        # These two are written for one stage per rank; the others take a list of chunks.
        takes_one = kind in (ScheduleGPipe, Schedule1F1B)
        self._schedule = (kind or _PipelineScheduleRuntime)(
            stages[0] if takes_one else stages, m, loss_fn=self._micro_batch_loss, scale_grads=False
        )
        if kind is None:
            _load(self._schedule, ours)
        self._location = ours.location
        self._is_first, self._is_last = 0 in indices, ours.num_virtual_stages - 1 in indices
        # Where the token embedding and the tied head lie. Every rank has to make the group, though
        # only these two use it.
        ends = sorted({ours.location[0][0], ours.location[-1][0]})
        self._tied_group = (
            distributed.new_group(ends) if config.model.tied_head and len(ends) == 2 else None
        )

    def forward_backward(self, batch: Batch) -> float:
        self._set_step_key(batch, training=True)
        torch._foreach_zero_([gradient_of(item.parameter) for item in self._named])
        self._events.clear()
        self._num_tokens = batch.num_tokens
        tokens, targets, samples = self._tensors(batch)
        # PyTorch takes tokens on the rank of the first stage alone, targets on that of the last.
        losses: list[Tensor] = []
        last: dict[str, Any] = {"target": targets, "losses": losses} if self._is_last else {}
        self._schedule.step(
            *([tokens] if self._is_first else []), samples=samples, return_outputs=False, **last
        )
        self._add_tied_gradients()
        return self._sum_over_ranks([math.fsum(loss.item() for loss in losses)])[0]

    def apply_gradients(self, step: int) -> float:
        names = [item.name for item in self._named if not item.is_copy]
        # One number for each tensor of the model, in canonical order: the sum has the same bits as
        # that of an engine whose stages are threads.
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
        distributed.broadcast(logits, src=self._location[-1][0])  # every rank gets all
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
        # Every rank takes part in every broadcast, whoever needs the result.
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
        # A part of the mini-batch's mean, so gradients are added up as they are: scale_grads=False.
        return summed_loss(logits, targets, self._num_tokens)

    def _sum_over_ranks(self, numbers: list[float]) -> list[float]:
        """All but one rank have 0 at each place."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        return total.tolist()

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: its own plus that of the head's copy, put in both."""
        both = [gradient_of(item.parameter) for item in self._named if item.name == TOKEN_EMBEDDING]
        if self._tied_group is not None and both:
            distributed.all_reduce(both[0], group=self._tied_group)
        elif len(both) == 2:
            both[1].copy_(both[0].add_(both[1]))


def _load(runtime: Any, schedule: Schedule) -> None:
    """Give PyTorch's interpreter of tables our table, as the file that it reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.csv"
        write_file(path, format_csv(schedule))
        runtime._load_csv(str(path))
