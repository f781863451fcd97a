"""What travels between the processes of a run in one step, in bytes, from formulas.

    from stage k to k + 1    b S D e         an activation, for each micro-batch
    back                     b S D e         its gradient
    within a stage           2 G / d         G bytes of gradients, each of d replicas to each other
    a tied head              V D e           the embedding's gradient, each end to the other

b sequences of a micro-batch, S positions, D width, V vocabulary, e bytes of an element, of a
gradient's sum in the master precision. An all-reduce needs no less than 2 G (d - 1) / d from each
replica (Patarasuk and Yuan 2009), which is what d - 1 times 2 G / d is.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

from common.schedule.action import Schedule
from common.schedule.dependencies import Step, sends_to
from common.spec.mesh import Mesh
from common.spec.parameters import parameter_shapes, unit_of
from common.spec.partition import plan_partition, schedule_of
from common.spec.run import ELEMENT_BYTES, RunConfig

Edge = tuple[int, int]
"""(from, to): ranks, or numbers of hosts."""


def traffic_bytes(config: RunConfig, schedule: Schedule | None = None) -> dict[Edge, int]:
    """Return the bytes that each rank sends to each other one in a training step, headers aside.

    `schedule` stands in for the one that `config` names.

    Example: 2 stages, 4 micro-batches of 2 sequences, S 16, D 32, float32: 4 x 2 x 16 x 32 x 4 =
    16,384 bytes from rank 0 to rank 1, and as many back.
    """
    schedule = schedule or schedule_of(config)
    mesh = Mesh(config.stages, config.replicas)
    sent: collections.Counter[Edge] = collections.Counter()
    for stages, count in _messages(config, schedule).items():
        for replica in range(mesh.replicas):
            sent[mesh.rank(stages[0], replica), mesh.rank(stages[1], replica)] += count
    gradients = _gradient_bytes(config, schedule)
    for stage in range(mesh.stages):
        for a in mesh.copies(stage):
            for b in mesh.copies(stage):
                if a != b:
                    sent[a, b] += math.ceil(2 * gradients[stage] / mesh.replicas)
    if config.model.tied_head:
        ends = schedule.location[0][0], schedule.location[-1][0]
        size = config.model.vocab_size * config.model.d_model
        for replica in range(mesh.replicas) if ends[0] != ends[1] else ():
            a, b = (mesh.rank(stage, replica) for stage in ends)
            for edge in ((a, b), (b, a)):
                sent[edge] += size * ELEMENT_BYTES[config.train.master_dtype]
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
            k = schedule.virtual_stage(device, action.chunk)
            to = sends_to(Step(action.op, action.micro_batch, k), schedule.num_virtual_stages)
            if to is not None and schedule.location[to][0] != device:
                size = config.micro_batch_sizes[action.micro_batch] * position
                sent[device, schedule.location[to][0]] += size
    return dict(sent)


def _gradient_bytes(config: RunConfig, schedule: Schedule) -> list[int]:
    """By stage, in the master precision; a tied head's copy counts where it is."""
    model = config.model
    size = collections.Counter[str]()
    for name, shape in parameter_shapes(model).items():
        size[unit_of(name)] += math.prod(shape)
    if model.tied_head:
        size["head"] += model.vocab_size * model.d_model
    parts = plan_partition(config).parts
    element = ELEMENT_BYTES[config.train.master_dtype]
    return [element * sum(size[unit] for k in own for unit in parts[k]) for own in schedule.parts]
