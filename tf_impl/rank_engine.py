"""The engine of a process that holds one stage of one replica: `PipelineEngine` with one stage,
whose messages and sums cross processes.

    stage 0, replica 0  ◄── activations, gradients ──►  stage 1, replica 0      links.py
           ▲                                                   ▲
           │ gradients, summed                                 │ gradients, summed
           ▼ chunk by chunk                                    ▼ chunk by chunk   gradient_sum.py
    stage 0, replica 1  ◄── activations, gradients ──►  stage 1, replica 1

`tf.distribute` has two strategies that come near. `MirroredStrategy` over a stage's replicas needs
all of them on one host; `MultiWorkerMirroredStrategy` around whole pipelines, all stages of a
replica. Here the latter starts the cluster (`ranks.py`), which knows its members and notices when
one is gone. The gradients are summed by collectives of its kind, when the schedule says.

Differs: Paddle's engine always holds one stage, so it has no second one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from common.oracle.reference import clip_scale, global_norm
from common.runtime.decode import Feed
from common.runtime.executor import Message
from common.runtime.reduce import Reduction
from common.runtime.world import World
from common.spec.data import Batch
from common.spec.mesh import Mesh
from common.spec.parameters import parameter_shapes
from common.spec.run import RunConfig
from tf_impl.compression import Compressor, RunningSum
from tf_impl.engine import PipelineEngine
from tf_impl.gpipe_model import GPipeModel
from tf_impl.groups import Group
from tf_impl.links import LinkedChannel, Links
from tf_impl.stage import Channel
from tf_impl.weights import named_parameters, to_array


class Ranks:
    """What the process of a rank keeps for all its engines: links and groups."""

    def __init__(self, world: World, mesh: Mesh) -> None:
        """Waits until all ranks have come."""
        self.mesh, (self.stage, self.replica, _) = mesh, mesh.place(world.rank)
        self._rank, self._groups = world.rank, dict[range, Group]()
        self.passes = 0
        """Begun so far: the same number on all ranks, so it is part of a message's address."""
        self.pipeline = mesh.pipeline(self.replica)
        # Besides the stages of a pipeline, all talk to the first rank, at the end (`wait_for_all`).
        peers = range(mesh.size) if world.rank == 0 else {*self.pipeline, 0}
        self.links = Links(
            world.rank,
            sorted(set(peers) - {world.rank}),
            world.hosts,
            lambda port: [int(row[0]) for row in self.gathered([port])],
            mesh.name,
        )

    def wait_for_all(self) -> None:
        """Return when all ranks call it. By messages: a collective may be over and still answer."""
        self.passes += 1
        come = [Message("word", rank, 0) for rank in range(self.mesh.size)]
        nothing, others = tf.zeros(0), range(1, self.mesh.size)
        if self._rank:
            self.links.send(0, self.passes, come[self._rank], nothing)
            self.links.take(0, self.passes, come[0])
            return
        for rank in others:
            self.links.take(rank, self.passes, come[rank])
        for rank in others:
            self.links.send(rank, self.passes, come[0], nothing)
        self.links.flush()

    def group(self, ranks: range) -> Group:
        """Return that of these ranks; all of them call it."""
        if ranks not in self._groups:
            # Every group is a row of ranks with equal distances, so these three name it.
            name = (ranks.start * self.mesh.size + ranks.step) * (self.mesh.size + 1) + len(ranks)
            device = f"/job:worker/replica:0/task:{self._rank}/device:CPU:0"
            self._groups[ranks] = Group(device, self._rank, len(ranks), name)
        return self._groups[ranks]

    def gathered(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values, in the order of the ranks; all have as many."""
        row = tf.constant(values, tf.float64)
        return [each.numpy().tolist() for each in self.group(range(self.mesh.size)).gather(row)]


class RankModel(GPipeModel):
    """A Transformer of which this process has one stage."""

    def __init__(self, ranks: Ranks, config: RunConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, held=[ranks.stage], **options)
        self._ranks, self._config = ranks, config
        self.compressors: dict[int, Compressor] = {}
        """By chunk."""
        self._reduction: Reduction | None = None
        # TensorFlow's collectives return when they are done: this thread waits for them.
        self._waiting = ThreadPoolExecutor(1, "sum")
        self._sums: list[RunningSum] = []
        spec = self.spec
        assert spec is not None
        count = len(parameter_shapes(spec)) * self.tensor_parallel
        self._most_values = max(self.schedule.num_micro_batches, count)

    def run_schedule(self, *arguments: Any) -> list[float]:
        actions = self.schedule.devices[self._ranks.stage]
        overlaps = self._config.reduce == "overlap"
        if self._ranks.mesh.replicas > 1:
            self._reduction = Reduction(actions, self._start_sum, overlaps)
        try:
            return super().run_schedule(*arguments)
        finally:
            self._reduction = None

    def everybodys(self, values: Sequence[float]) -> list[float]:
        """Return the values of all ranks, of which some may have none."""
        # Rows of one length, with the number of values ahead.
        row = [len(values), *values, *[0.0] * (self._most_values - len(values))]
        return [
            value for count, *others in self._ranks.gathered(row) for value in others[: int(count)]
        ]

    def close(self) -> None:
        self._waiting.shutdown()
        super().close()

    def _open_channel(self) -> Channel:
        self._ranks.passes += 1
        own = self._ranks
        return LinkedChannel(own.links, own.stage, own.pipeline, own.passes)

    def _ahead(self) -> None:
        if self._reduction is not None:
            self._reduction.before()

    def _behind(self) -> None:
        if self._reduction is not None:
            self._reduction.finish()
        while self._sums:
            self._sums.pop(0).finish()

    def _start_sum(self, chunk: int) -> None:
        """Begin to add up a chunk's gradients over the replicas."""
        own = self.stages[self._ranks.stage].chunks[chunk]
        tied = self._config.model.tied_head
        named = named_parameters([unit.unit_name for unit in own.layers], own.layers, tied)
        if chunk not in self.compressors:
            self.compressors[chunk] = Compressor(self._config, named)
        found = {id(weight.variable): weight.gradient for weight in own.weights}
        gradients = [found[id(item.parameter)] for item in named]
        copies = self._ranks.mesh.copies(self._ranks.stage)
        group = self._ranks.group(range(copies[0], copies[-1] + 1))
        self._sums.append(self.compressors[chunk].start(gradients, group, self._waiting))

    def _add_tied_gradients(self) -> None:
        """As in one process; where embedding and head's copy are apart, their two ranks add up."""
        pairs = self._tied
        if all(end is not None for pair in pairs for end in pair):
            super()._add_tied_gradients()
            return
        first, last = (
            self._ranks.mesh.rank(self.schedule.location[k][0], self._ranks.replica)
            for k in (0, -1)
        )
        ends = sorted((first, last))
        for variable in itertools.chain(*pairs):
            if variable is not None:
                gradient = self.gradient_of(variable)
                group = self._ranks.group(range(ends[0], ends[1] + 1, ends[1] - ends[0]))
                gradient.assign(group.sum(tf.convert_to_tensor(gradient)))

    def _clip(self, squares: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
        # The replicas' gradients are the same, and count once.
        own = [square for stage in squares for square in stage]
        norm = global_norm(self.everybodys(own if self._ranks.replica == 0 else []))
        return norm, [clip_scale(norm, self.optimizer.global_clipnorm)] * len(self.stages)


class RankEngine(PipelineEngine):
    """One stage of one replica (`common.runtime.engine.Engine`)."""

    model: RankModel

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._ranks, self.replica = ranks, ranks.replica
        super().__init__(config, functools.partial(RankModel, ranks, config))

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.model.compressors = {}
        super().reset(weights)

    def forward_backward(self, batch: Batch) -> float:
        rows = self._rows(batch)
        inputs, targets = (tf.constant(a[rows]) for a in (batch.inputs, batch.targets))
        losses = self.model.run_schedule(
            inputs, [targets], float(batch.num_tokens), self._context(batch)
        )
        return math.fsum(self._everybodys(losses))

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """As the protocol says: the rank that has the head sends the logits to the others."""
        pieces, _ = self.model.forward_pieces(inputs)
        last = self.model.schedule.location[-1][0]
        links, number = self._ranks.links, self._ranks.passes
        # As if they went on to the virtual stage behind the last.
        logits = Message("activation", 0, self.model.schedule.num_virtual_stages)
        if self._ranks.stage != last:
            return to_array(tf.constant(links.take(self._ranks.pipeline[last], number, logits)))
        found = tf.concat(pieces, 0)  # (B, S, V)
        for rank in set(self._ranks.pipeline) - {self._ranks.pipeline[last]}:
            links.send(rank, number, logits, found)
        return to_array(found)

    def decode(self, feed: Feed) -> None:
        """Raise ValueError: replicas train, and text is generated by the stages of one process."""
        raise ValueError("a rank does not generate; expected one process and no replicas")

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._ranks.gathered(values), strict=True)]

    def _everybodys(self, values: list[float]) -> list[float]:
        return self.model.everybodys(values)
