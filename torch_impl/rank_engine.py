"""The engine of a process that holds one stage of one replica, or a shard of it: `PipelineEngine`
with one stage, whose messages and sums cross processes.

    stage 0, replica 0  ◄── activations, gradients ──►  stage 1, replica 0      links.py
           ▲                                                   ▲
           │ gradients, summed                                 │ gradients, summed
           ▼ chunk by chunk                                    ▼ chunk by chunk
    stage 0, replica 1  ◄── activations, gradients ──►  stage 1, replica 1

DistributedDataParallel does not fit here. It sums at a backward, and a stage has one for each
micro-batch, with forwards between, which reset what it has counted; W goes round its hooks.
Gradients are then 24 to 59 % off, without an error (docs/hosts.md has the table).

The shards of a stage add up within its blocks (`torch_impl.shard_engine`).

Differs: Paddle's engine always holds one stage, so it has no second one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product, starmap
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from common.runtime.cpus import threads_per_stage
from common.runtime.mode import Mode
from common.runtime.reduce import Reduction
from common.runtime.world import World
from common.schedule.action import Schedule
from common.spec.data import Batch
from common.spec.mesh import Mesh
from common.spec.parameters import TOKEN_EMBEDDING
from common.spec.run import RunConfig
from torch_impl.compression import Compressor, RunningSum
from torch_impl.gradients import gradient_of
from torch_impl.links import LinkedChannel, directed_groups
from torch_impl.shard_engine import ShardEngine
from torch_impl.shards import Shards, columns_of
from torch_impl.stage import Channel
from torch_impl.weights import to_array

_Values = TypeVar("_Values")


class RankEngine(ShardEngine):
    """One shard of one stage of one replica (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self._mesh = mesh = Mesh.of(config)
        self._stage, self.replica, shard = mesh.place(world.rank)
        threads = threads_per_stage(world.local_size, config.threads)
        # Every process makes every group, in one order.
        stages = range(mesh.stages)
        if mesh.shards > 1:
            together = starmap(mesh.shard_group, product(stages, range(mesh.replicas)))
            group = _own_group(list(together), world.rank)
            self.shards = Shards(mesh.shards, shard, columns_of(config), group)
        self._build(config, (self._stage,), [device] * config.stages, threads)
        self._ranks = mesh.pipeline(mesh.line(world.rank))
        self._passes = 0
        self._reduction: Reduction | None = None
        self._sums: list[RunningSum] = []
        self._compressors: dict[int, Compressor] = {}
        """By chunk."""
        uses_nccl = device.type == "cuda"
        lines = [mesh.pipeline(line) for line in range(mesh.lines)]
        edges = [directed_groups(self.schedule, ranks) if uses_nccl else {} for ranks in lines]
        self._edges = edges[mesh.line(world.rank)]
        self._pipeline = _own_group(lines, world.rank)
        copies = starmap(mesh.copies, product(stages, range(mesh.shards)))
        self._copies = _own_group(list(copies), world.rank)
        # A tied head's two ends: the embedding's stage, and the head's where it is another.
        ends = sorted({self.schedule.location[0][0], self.schedule.location[-1][0]})
        self._are_apart = config.model.tied_head and len(ends) == 2
        pairs = [[ranks[stage] for stage in ends] for ranks in lines]
        self._ends = _own_group(pairs, world.rank) if self._are_apart else None

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._compressors = {}
        super().reset(weights)

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """As the protocol says: the rank that has the head sends the logits to the others."""
        nothing = Batch(0, inputs, np.zeros_like(inputs))
        self._run(self.schedule.only_forward(), nothing, Mode.PREDICT)
        own = self.stages[self._stage].outputs
        last = self.schedule.location[-1][0]
        shape = [*inputs.shape, self.config.model.vocab_size]
        dtype = torch.float64 if self.config.train.dtype == "float64" else torch.float32
        logits = torch.empty(shape, dtype=dtype, device=self.stages[self._stage].device)
        if self._stage == last:
            logits = torch.cat([own[key] for key in sorted(own)]).to(dtype)  # (B, S, V)
        self._drop_outputs()
        distributed.broadcast(logits, self._ranks[last], group=self._pipeline)
        return to_array(logits)

    def _run(self, schedule: Schedule, batch: Batch, mode: Mode) -> float:
        self._passes += 1
        self._sums = []
        shares = (0, 1) if mode is Mode.PREDICT else (self.replica, self._mesh.replicas)
        pieces = batch.share(*shares, self.config.train.micro_batches)
        width = self.config.model.d_model
        self._shapes = [(*piece.inputs.shape, width) for piece in pieces]
        sums = mode is Mode.TRAIN and self._mesh.replicas > 1
        self._reduction = (
            Reduction(
                schedule.devices[self._stage], self._start_sum, self.config.reduce == "overlap"
            )
            if sums
            else None
        )
        return super()._run(schedule, batch, mode)

    def _open_channel(self, schedule: Schedule, mode: Mode) -> Channel:
        self._channel = LinkedChannel(
            schedule,
            self._stage,
            self._ranks,
            self._edges,
            self._passes,
            self._shapes,
            getattr(torch, self.config.train.dtype),
            self.stages[self._stage].device,
        )
        return self._channel

    def _ahead(self) -> None:
        if self._reduction is not None:
            self._reduction.before()

    def _behind(self) -> None:
        self._channel.finish()
        if self._reduction is not None:
            self._reduction.finish()
        for each in self._sums:
            each.finish()

    def _start_sum(self, chunk: int) -> None:
        """Begin to add up a chunk's gradients over the replicas."""
        named = self.stages[self._stage].chunks[chunk].named
        if chunk not in self._compressors:
            self._compressors[chunk] = Compressor(self.config, named)
        gradients = [gradient_of(item.parameter) for item in named]
        self._sums.append(self._compressors[chunk].start(gradients, self._copies))

    def _of_all(self, values: _Values) -> list[_Values]:
        return gathered(values)

    def _of_shards(self, values: _Values) -> list[_Values]:
        return gathered(values, self.shards.group)

    def _add_tied_gradients(self) -> None:
        """As in one process; where embedding and head's copy are apart, their two ranks add up."""
        if not self._are_apart:
            if any(item.is_copy for item in self._named):
                super()._add_tied_gradients()
            return
        for item in self._named:
            if item.name == TOKEN_EMBEDDING:
                gradient = gradient_of(item.parameter)
                self._on(self._stage, lambda: distributed.all_reduce(gradient, group=self._ends))  # noqa: B023


def _own_group(all_ranks: Sequence[Sequence[int]], own: int) -> Any:
    """Make a group of each list of ranks; return that of the rank `own`, if it is in any."""
    groups = [distributed.new_group(list(ranks)) for ranks in all_ranks]
    return next((g for g, ranks in zip(groups, all_ranks, strict=True) if own in ranks), None)


def gathered(values: _Values, group: Any = None) -> list[_Values]:
    """Return the values of every rank of a group, by default of all, in their order."""
    rows: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(rows, values, group)
    return rows
