"""Find the fastest way to run a model on so many devices within so much memory.

    [1] `candidates` lists p, schedule, v and m, as the model and the schedule allow; where they
                     may be, also d replicas and t shards, so that d p t devices are used
    [2] `plan_one`   cuts the model for one of them, within the memory limit, so that the largest
                     device is as small as can be; with the fastest recomputation that fits; and
                     simulates a step
    [3] `_nearest`   finds by how much the others of a schedule miss the limit
    [4] `make_plans` ranks what fits

Memory: `common.spec.memory`. Time: `common.spec.unit_times` and `common.schedule.play`, and over
a link of so many bytes a second what travels (`common.spec.traffic` has the same bytes):

    a message          b S D e                     one of a device after the other
    a shard's sum      2 (t - 1) / t  b S D e      two for a block in F, two in B or BW, none in W
    a replica's sum    2 (d - 1) / d  G            of gradients, behind the step: overlap would gain

A shard computes 1 / t of a block. That is a little too good, since it repeats norms and residuals.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.schedule.action import Op, Schedule, ScheduleError
from common.schedule.generators import GENERATORS, SEARCH, make_schedule
from common.schedule.occupancy import remembered_table
from common.schedule.play import play
from common.schedule.table import OP_CODE, OPS
from common.spec.efficiency import model_flops_per_token
from common.spec.memory import DeviceMemory, Memory, kinds_of
from common.spec.memory_limit import balanced_within, least_limit
from common.spec.mesh import Mesh
from common.spec.parameters import unit_names
from common.spec.partition import balanced
from common.spec.rules import why_no_mesh
from common.spec.run import ELEMENT_BYTES, RunConfig
from common.spec.unit_times import KINDS, UnitTimes

RECOMPUTE = ("none", "except-last", "every-1", "full")
"""From the one that costs least time to the one that holds least."""
WEIGHED = [name for name in GENERATORS if name != SEARCH]
"""A search takes seconds for every m, and there are hundreds of candidates."""
MOST_PER_DEVICE = 64
"""Micro-batches: more would only make the table longer."""

_BACKWARD = [OP_CODE[op] for op in (Op.B, Op.BW)]
"""What takes the forward's time too, where it is computed again."""


@dataclass(frozen=True)
class Plan:
    """One way to run the model, with what it would take."""

    config: RunConfig
    step_seconds: float
    bubble_fraction: float
    memory: tuple[DeviceMemory, ...]
    peak_flops_per_device: float | None

    @property
    def model_flops_per_device(self) -> float:
        """Model FLOPs a second, without recomputation (`common.spec.efficiency`)."""
        flops = self.tokens_per_second * model_flops_per_token(self.config)
        return flops / Mesh.of(self.config).size

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization; None where the peak is not known."""
        peak = self.peak_flops_per_device
        return None if peak is None else self.model_flops_per_device / peak

    @property
    def tokens_per_second(self) -> float:
        train = self.config.train
        return train.batch_size * self.config.model.context_length / self.step_seconds

    @property
    def peak_bytes(self) -> int:
        return max(memory.total_bytes for memory in self.memory)


@dataclass(frozen=True)
class Refused:
    """What needs least, of a schedule's candidates that do not fit, whatever is recomputed."""

    config: RunConfig
    device: int
    missing_bytes: int
    count: int
    """How many candidates these are."""


@dataclass(frozen=True)
class Plans:
    """What fits, the fastest first, and of what does not the nearest, one for a schedule."""

    found: tuple[Plan, ...]
    refused: tuple[Refused, ...]
    unlimited: tuple[Plan, ...]
    """All as they would be without the limit, the fastest first."""


def best_per_schedule(plans: Iterable[Plan]) -> dict[str, Plan]:
    """Return the first plan of each schedule."""
    best: dict[str, Plan] = {}
    for plan in plans:
        best.setdefault(plan.config.schedule, plan)
    return best


def make_plans(
    base: RunConfig,
    devices: int,
    times: UnitTimes,
    memory_limit_bytes: float = float("inf"),
    schedules: Sequence[str] = (),
    has_replicas: bool = False,
    has_shards: bool = False,
) -> Plans:
    """Plan every candidate and rank them. [4]"""
    found, unlimited, refused = [], [], dict[str, Refused]()
    for config in candidates(base, devices, schedules or WEIGHED, has_replicas, has_shards):
        memories = _memories(config)
        free = _fastest(memories, times, float("inf"))
        assert free is not None
        unlimited.append(free)
        # A device's share of weights, gradients and moments: the same in every cut and mode.
        share = sum(each.state_bytes for each in free.memory) / config.stages
        if free.peak_bytes <= memory_limit_bytes:
            found.append(free)
        elif share <= memory_limit_bytes and (
            plan := _fastest(memories, times, memory_limit_bytes)
        ):
            found.append(plan)
        else:
            best = refused.get(config.schedule) or _refused(
                free.config, free.memory, memory_limit_bytes, 0
            )
            if share < memory_limit_bytes + best.missing_bytes:
                best = _nearest(memories, memory_limit_bytes, best)
            refused[config.schedule] = replace(best, count=best.count + 1)
    return Plans(
        tuple(sorted(found, key=_rank)),
        tuple(sorted(refused.values(), key=lambda each: each.missing_bytes)),
        tuple(sorted(unlimited, key=_rank)),
    )


def _rank(plan: Plan) -> tuple[float, int, int, int, int]:
    """Order by the step; of equal ones the least memory and the fewest parts come first."""
    # On one device every schedule takes the same: without rounding the last bit would decide.
    config = plan.config
    parts = config.chunks, config.stages, config.train.micro_batches
    return float(f"{plan.step_seconds:.9g}"), plan.peak_bytes, *parts


def candidates(
    base: RunConfig,
    devices: int,
    schedules: Iterable[str],
    has_replicas: bool = False,
    has_shards: bool = False,
) -> Iterator[RunConfig]:
    """Yield the runs to compare, not yet cut; those that hold less come first, as a rule. [1]

    m: the divisors of a replica's share of the mini-batch, and multiples of the stages, whose
    pieces may be uneven; at most `MOST_PER_DEVICE` for each, where 1f1b's bubble is below 1/64.
    """
    units, names = len(unit_names(base.model)), list(schedules)
    for d, t in _lines(base, devices, has_replicas, has_shards):
        axes = {"replicas": d, "tensor_parallel": t}
        cut = base.model_copy(update=axes | {"vocab_parallel": base.vocab_parallel and t > 1})
        batch = base.train.batch_size // d
        # A stage without a unit does nothing.
        used = min(devices // (d * t), units)
        if batch == 0 or why_no_mesh(cut) is not None:
            continue
        most = min(batch, MOST_PER_DEVICE * used)
        # Of 60 sequences on 4 devices: 1 2 3 4 5 6 10 12 15 20 30 60, all micro-batches alike, and
        # also 8 16 24 28 32, where some have one sequence more but every round is full.
        counts = {m for m in range(1, most + 1) if batch % m == 0}
        counts |= {used * k for k in range(1, 9) if used * k <= most}
        # Fewer devices are worth a look only where stages are all there is.
        for stages in range(used, 0, -1) if d * t == 1 else [used]:
            for name in names:
                chunks = GENERATORS[name].chunks
                for v in [chunks] if chunks else [2, 3, 4]:
                    if stages * v > units:
                        continue
                    for m in sorted(counts, reverse=True):
                        train = base.train.model_copy(update={"micro_batches": m})
                        run = {"stages": stages, "schedule": name, "chunks": v, "train": train}
                        run["partition"] = "balanced"
                        config = cut.model_copy(update=run)
                        if _schedule(config) is not None:
                            yield config


def _lines(
    base: RunConfig, devices: int, has_replicas: bool, has_shards: bool
) -> Iterator[tuple[int, int]]:
    """Yield (d, t): as the run has them, or all that leave every pipeline as many devices."""
    # No more replicas than sequences, no more shards than heads, however many devices there are.
    most_replicas = min(devices, base.train.batch_size) if has_replicas else 0
    most_shards = min(devices, base.model.num_heads) if has_shards else 0
    replicas = [d for d in range(1, most_replicas + 1) if devices % d == 0] or [base.replicas]
    shards = [t for t in range(1, most_shards + 1) if devices % t == 0] or [base.tensor_parallel]
    for d, t in itertools.product(replicas, shards):
        if d * t <= devices and (devices % (d * t) == 0 or not (has_replicas or has_shards)):
            yield d, t


def plan_one(config: RunConfig, times: UnitTimes, memory_limit_bytes: float) -> Plan | None:
    """Cut the model and simulate a step, with the fastest recomputation that fits; None if none
    does. A run that is cut already, at named boundaries, stays so. [2]"""
    return _fastest(_memories(config), times, memory_limit_bytes)


def _memories(config: RunConfig) -> list[Memory]:
    """Return the run's memory with every mode of recomputation."""
    schedule = _schedule(config)
    if schedule is None:
        raise ScheduleError(f"schedule {config.schedule} has no such size")
    return [Memory(config.model_copy(update={"recompute": mode}), schedule) for mode in RECOMPUTE]


def _fastest(memories: Sequence[Memory], times: UnitTimes, limit_bytes: float) -> Plan | None:
    run = memories[0].config
    times = times.while_so_many_compute(run.stages * run.replicas * run.tensor_parallel)
    fastest: Plan | None = None
    # In this order they cost more and more time for the same cut. But to recompute more can be
    # faster where otherwise memory would make the cut uneven: 3.4 s for 4.0 s of gpt2-small on four
    # devices with 2.447 GB.
    for memory in memories:
        found = _cut(memory, times, limit_bytes)
        if found is None:
            continue
        parts, held, is_fastest = found
        boundaries = tuple(np.cumsum([len(part) for part in parts])[:-1].tolist())
        config = memory.config.model_copy(update={"partition": boundaries})
        parameters = max(each.parameters for each in held)
        step, bubble = _step(config, memory.schedule, parts, parameters, times)
        if fastest is None or step < fastest.step_seconds:
            fastest = Plan(config, step, bubble, tuple(held), times.peak_flops_per_device)
        if is_fastest:
            break
    return fastest


def _nearest(memories: Sequence[Memory], limit_bytes: float, best: Refused) -> Refused:
    """Return the one that needs least, of these in any cut and of the `best` so far. [3]"""
    for memory in reversed(memories):  # what recomputes most needs least, as a rule
        # Most are soon known to need more than the best so far, and only a better one is measured.
        config, below = memory.config, int(limit_bytes) + best.missing_bytes
        inner = least_limit(config.model.num_layers, memory.all_lines, below)
        if inner is not None:
            held = memory.of_parts(_parts(config, inner))
            cut = config.model_copy(update={"partition": tuple(inner)})
            best = _refused(cut, held, limit_bytes, best.count)
    return best


def _refused(
    config: RunConfig, held: Sequence[DeviceMemory], limit_bytes: float, count: int
) -> Refused:
    device = max(range(len(held)), key=lambda d: held[d].total_bytes)
    return Refused(config, device, held[device].total_bytes - int(limit_bytes), count)


@lru_cache(maxsize=16)
def _made(name: str, stages: int, micro_batches: int, chunks: int) -> Schedule | None:
    try:
        return make_schedule(name, stages, micro_batches, chunks)
    except ScheduleError:  # the schedule has no such size
        return None


def _schedule(config: RunConfig) -> Schedule | None:
    return _made(config.schedule, config.stages, config.train.micro_batches, config.chunks)


@lru_cache(maxsize=64)
def _fastest_cut(
    embedding: float, block: float, head: float, layers: int, devices: tuple[int, ...]
) -> list[int]:
    """Remembered: with counted costs all candidates of one placement have the same."""
    return balanced([embedding, *[block] * layers, head], devices)


def _cut(
    memory: Memory, times: UnitTimes, limit_bytes: float
) -> tuple[list[tuple[str, ...]], list[DeviceMemory], bool] | None:
    """Return the parts of the cut with the smallest largest device that fits, what they hold, and
    whether they are those without the limit; None if none fits."""
    config, schedule = memory.config, memory.schedule
    layers = config.model.num_layers
    # What a step computes of each unit. A cut adds the same number of actions to every part, so
    # what an action costs besides changes nothing.
    sequences, m = config.micro_batch_sizes[0], config.train.micro_batches
    again = memory.recomputed
    backward = (Op.B, Op.W) if schedule.splits_backward else (Op.BW,)
    work = [
        (m + again) * _seconds(config, times, unit, Op.F, sequences)
        + m * sum(_seconds(config, times, unit, op, sequences) for op in backward)
        for unit in KINDS
    ]
    # In blocks, and without the last digits: no rounding may decide between two equal cuts.
    embedding, block, head = (round(each / (work[1] or 1.0), 9) for each in work)
    devices = tuple(device for device, _ in schedule.location)

    # First without the limit: most candidates fit as they are, and what follows is slow.
    cut = config.partition if isinstance(config.partition, tuple) else None
    parts = _parts(config, cut or _fastest_cut(embedding, block, head, layers, devices))
    found = memory.of_parts(parts)
    if max(each.total_bytes for each in found) <= limit_bytes:
        return parts, found, True
    if cut:
        return None
    # The limit changes the cut: the first device has the most micro-batches in flight and the last
    # one the logits, so both may have to do with fewer blocks than would be fastest.
    inner = balanced_within((embedding, block, head), layers, memory.all_lines, limit_bytes)
    if inner is None:
        return None
    parts = _parts(config, inner)
    return parts, memory.of_parts(parts), False


def _parts(config: RunConfig, inner: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the units of every virtual stage, cut at these boundaries."""
    units = unit_names(config.model)
    return [tuple(units[a:b]) for a, b in itertools.pairwise([0, *inner, len(units)])]


def _step(
    config: RunConfig,
    schedule: Schedule,
    parts: Sequence[Sequence[str]],
    parameters: int,
    times: UnitTimes,
) -> tuple[float, float]:
    """Return the seconds of a step and the bubble fraction. The optimizer waits for the device with
    the most parameters."""
    table, train = remembered_table(schedule), config.train
    sizes = np.array(config.micro_batch_sizes)[table.micro_batch]  # (n,)
    recomputed = [config.recomputes(i) for i in range(train.micro_batches)]
    again = np.array(recomputed)[table.micro_batch] & np.isin(table.op, _BACKWARD)  # (n,)
    spent = np.empty(table.num_rows)
    for size in set(config.micro_batch_sizes):
        cost, rows = _costs(config, parts, times, size), sizes == size
        place = table.virtual_stage[rows]
        spent[rows] = cost[table.op[rows], place] + again[rows] * cost[OP_CODE[Op.F], place]
    # A receiver needs that long for every message, whether it waited for it or not.
    spent += table.receives * times.receive_seconds
    spent[table.leads + 1] += spent[table.leads]  # two that overlap: the second takes both times
    spent[table.leads] = 0.0
    link, d = times.link_bytes_per_second, config.replicas
    hops = [max(0.0, times.hop_seconds - times.receive_seconds)] * table.num_rows
    sent = None
    if link < float("inf"):
        sent = (table.messages * sizes * _sequence_bytes(config) / link).tolist()
    played = play(table, spent.tolist(), hops, transmissions=sent)
    makespan = max(played.end)
    gradients = parameters * ELEMENT_BYTES[train.master_dtype]
    optimizer = parameters * times.optimizer_seconds_per_parameter
    optimizer += 2 * (d - 1) / d * gradients / link
    # All devices together have p x makespan seconds. What no action fills of them is the bubble.
    bubble = max(0.0, 1 - float(spent.sum()) / (schedule.num_devices * makespan))
    return makespan + optimizer + times.rest_seconds, bubble


def _costs(
    config: RunConfig, parts: Sequence[Sequence[str]], times: UnitTimes, sequences: int
) -> NDArray[np.float64]:
    """Return (4, K): the seconds of every operation on every part."""
    counts = np.array([[kinds_of(part).count(kind) for part in parts] for kind in KINDS])  # (3, K)
    units = [[_seconds(config, times, kind, op, sequences) for kind in KINDS] for op in OPS]
    action = np.array([[times.of_action(op, sequences)] for op in OPS])  # (4, 1)
    costs: NDArray[np.float64] = action + np.array(units) @ counts
    return costs


def _seconds(config: RunConfig, times: UnitTimes, unit: str, op: Op, sequences: int) -> float:
    """Return what one operation of one unit takes a shard, its sums with the others included."""
    seconds, t = times.of(unit, op, sequences), config.tensor_parallel
    if t == 1:
        return seconds
    if not unit.startswith("block"):
        return seconds / t if config.vocab_parallel else seconds
    sums = 0 if op is Op.W else 2
    sent = sums * 2 * (t - 1) / t * sequences * _sequence_bytes(config)
    return seconds / t + sent / times.link_bytes_per_second


def _sequence_bytes(config: RunConfig) -> int:
    """Return the bytes of one sequence between two units: S D e."""
    return config.model.context_length * config.model.d_model * ELEMENT_BYTES[config.train.dtype]
