"""What travels between the processes of a run in one step, in bytes, from formulas.

    from stage k to k + 1    b S D e         an activation, for each micro-batch
    back                     b S D e         its gradient
    within a stage           2 G / d         G bytes of gradients, each of d replicas to each other,
                                             or what `compress` sends instead
    among its shards         2 b S D e / t   a sum, each of t shards to each other: a block has two
                                             in F and two in B, 4 b S D e with t = 2
    a tied head              V D e           the embedding's gradient, each end to the other

b sequences of a micro-batch, S positions, D width, V vocabulary, e bytes of an element, of a
gradient's sum in the master precision. An all-reduce needs no less than 2 G (d - 1) / d from each
replica (Patarasuk and Yuan 2009), which is what d - 1 times 2 G / d is. Every shard sends its whole
activation to the next stage's, and G is what it has itself. Where the vocabulary is cut too, the
embedding has a sum in F and the head one in B, and before the loss three numbers of every position
go to every other shard.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence

from common.schedule.action import Op, Schedule
from common.schedule.dependencies import Step, sends_to
from common.spec.mesh import Mesh
from common.spec.parameters import TOKEN_EMBEDDING, parameter_shapes, unit_of
from common.spec.partition import plan_partition, schedule_of
from common.spec.run import ELEMENT_BYTES, RunConfig
from common.spec.shards import own_tokens, shard_shape

Edge = tuple[int, int]
"""(from, to): ranks, or numbers of hosts."""


def traffic_bytes(config: RunConfig, schedule: Schedule | None = None) -> dict[Edge, int]:
    """Return the bytes that each rank sends to each other one in a training step, headers aside.

    `schedule` stands in for the one that `config` names.

    Example: 2 stages, 4 micro-batches of 2 sequences, S 16, D 32, float32: 4 x 2 x 16 x 32 x 4 =
    16,384 bytes from rank 0 to rank 1, and as many back.
    """
    # Three kinds of edges: along a line of stages, among the copies of one shard (its replicas),
    # among the shards of one stage. The rank numbers say which (`common.spec.mesh`).
    schedule = schedule or schedule_of(config)
    mesh = Mesh.of(config)
    sent: collections.Counter[Edge] = collections.Counter()
    lines = [mesh.pipeline(line) for line in range(mesh.lines)]
    for stages, count in _messages(config, schedule).items():
        for ranks in lines:
            sent[ranks[stages[0]], ranks[stages[1]]] += count
    # As on every line: replica 0 has the largest micro-batches, shards differ by columns alone.
    sums = _shard_sum_bytes(config, schedule) if mesh.shards > 1 else [0] * mesh.stages
    for stage, shard in itertools.product(range(mesh.stages), range(mesh.shards)):
        gradients = _gradient_bytes(config, schedule, stage, shard if mesh.shards > 1 else None)
        # Ordered pairs: with 2 replicas, 0 to 1 and 1 to 0, each with half of 2 G, which is G. Of
        # compressed gradients that are gathered each sends the whole message to each other one.
        for a, b in itertools.permutations(mesh.copies(stage, shard), 2):
            sent[a, b] += config.compression.pair_bytes(gradients, mesh.replicas)
    for stage, replica in itertools.product(range(mesh.stages), range(mesh.replicas)):
        for edge in itertools.permutations(mesh.shard_group(stage, replica), 2):
            sent[edge] += sums[stage]
    # A V has both ends on one device, and then the two copies meet without a message.
    ends = schedule.location[0][0], schedule.location[-1][0]
    if config.model.tied_head and ends[0] != ends[1]:
        element = ELEMENT_BYTES[config.train.master_dtype] * config.model.d_model
        for line, ranks in enumerate(lines):
            rows = len(own_tokens(config, line % mesh.shards)) if mesh.shards > 1 else None
            a, b = (ranks[stage] for stage in ends)
            for edge in ((a, b), (b, a)):
                sent[edge] += element * (rows or config.model.vocab_size)
    return dict(sent)


def between_hosts(sent: Mapping[Edge, int], hosts: Sequence[str]) -> dict[tuple[str, str], int]:
    """Return the bytes by link, given the host of every rank; (a, a) is what stays within a."""
    links: collections.Counter[tuple[str, str]] = collections.Counter()
    for (a, b), count in sent.items():
        links[hosts[a], hosts[b]] += count
    return dict(links)


def blocks(size: int, count: int) -> list[str]:
    """Return the host of every rank, where each of `count` hosts has ranks in a row."""
    return [f"host {rank * count // size}" for rank in range(size)]


def _messages(config: RunConfig, schedule: Schedule) -> dict[Edge, int]:
    """The bytes between two stages of replica 0, whose micro-batches are the largest."""
    model = config.model
    position = model.context_length * model.d_model * ELEMENT_BYTES[config.train.dtype]
    sent: collections.Counter[Edge] = collections.Counter()
    for device, actions in enumerate(schedule.devices):
        for action in actions:
            # W sends nothing, F on the last and B on the first virtual stage neither. Two chunks
            # that lie on one device hand over a pointer.
            k = schedule.virtual_stage(device, action.chunk)
            to = sends_to(Step(action.op, action.micro_batch, k), schedule.num_virtual_stages)
            if to is not None and schedule.location[to][0] != device:
                size = config.micro_batch_sizes[action.micro_batch] * position
                sent[device, schedule.location[to][0]] += size
    return dict(sent)


def _gradient_bytes(config: RunConfig, schedule: Schedule, stage: int, shard: int | None) -> int:
    """Of a stage, or of a shard of it, as they are sent: whole ones in the master precision. A tied
    head's copy counts where it is.
    """
    parts = plan_partition(config).parts
    units = [unit for k in schedule.parts[stage] for unit in parts[k]]
    size, element = collections.Counter[str](), ELEMENT_BYTES[config.train.master_dtype]
    for name, shape in parameter_shapes(config.model).items():
        own = shape if shard is None else shard_shape(config, name, shape, shard)
        message = config.compression.message_bytes(own, element)
        # Tensor by tensor: what a compressor sends depends on the shape; of a vector all.
        size[unit_of(name)] += message
        if name == TOKEN_EMBEDDING and config.model.tied_head:
            size["head"] += message
    return sum(size[unit] for unit in units)


def _shard_sum_bytes(config: RunConfig, schedule: Schedule) -> list[int]:
    """What each shard of a stage sends to each other one. Recomputation repeats the sums of F, but
    not one whose result nothing is computed from; it is not counted.
    """
    model, t, parts = config.model, config.tensor_parallel, plan_partition(config).parts
    element = ELEMENT_BYTES[config.train.dtype]
    found = []
    for device, actions in enumerate(schedule.devices):
        count = 0
        for action in actions:
            units = parts[schedule.virtual_stage(device, action.chunk)]
            # Two in a block: behind the attention's output projection and the feed-forward.
            sums = 2 * sum(unit.startswith("block") for unit in units)
            end = "embedding" if action.op is Op.F else "head"
            sums += config.vocab_parallel and end in units
            positions = config.micro_batch_sizes[action.micro_batch] * model.context_length  # b S
            # B and BW sum inputs' gradients where F summed outputs, as often; a W nothing.
            if action.op is not Op.W:
                count += 2 * sums * positions * model.d_model * element // t
            # Of every position the largest logit, the sum of exponentials and the target's logit:
            # three numbers stand for V of them (Shoeybi et al. 2019, section 3).
            if action.op is Op.F and config.vocab_parallel and "head" in units:
                count += 3 * positions * max(element, ELEMENT_BYTES["float32"])
        found.append(count)
    return found
