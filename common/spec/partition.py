"""Decide which units of the model are on which stage.

A unit is what a partition may not cut: the embedding, one block, the head. A plan cuts the row of
units into consecutive parts, one for every virtual stage, none of them empty:

    unit        embedding   block.0   block.1 │ block.2   block.3   head
    index           0          1         2    │    3         4       5
    part        0 ─────────────────────────── │ 1 ──────────────────────      boundaries (0, 3, 6)

    [1] `unit_costs`             counts what every unit costs
    [2] `even_boundaries`        the same number of blocks everywhere, as nearly as possible
    [3] `balanced_boundaries`    the smallest largest part, one part per device
    [4] `balanced_over_devices`  the smallest largest device, several parts per device
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace

from common.schedule.action import Schedule
from common.schedule.generators import make_schedule
from common.spec.parameters import parameter_shapes, unit_names, unit_of
from common.spec.run import ELEMENT_BYTES, RunConfig, TrainSpec, TransformerSpec


@dataclass(frozen=True)
class UnitCost:
    """What one unit costs for the first micro-batch, counted (not measured)."""

    unit: str
    parameters: int
    forward_flops: int
    activation_bytes: int
    """Size of the unit's output, which a cut after it has to send."""


@dataclass(frozen=True)
class PartitionPlan:
    """`parts[k]` names the units of virtual stage k."""

    parts: tuple[tuple[str, ...], ...]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The index of every part's first unit, and the number of units: (0, ..., n)."""
        return tuple(itertools.accumulate((len(part) for part in self.parts), initial=0))

    def part_of(self, unit: str) -> int:
        return next(k for k, part in enumerate(self.parts) if unit in part)


def schedule_of(config: RunConfig) -> Schedule:
    """Return the schedule of a run. Raises ScheduleError if there is none of its size."""
    size = config.stages, config.train.micro_batches, config.chunks
    return make_schedule(config.schedule, *size)


def unit_costs(model: TransformerSpec, train: TrainSpec) -> list[UnitCost]:
    """Count parameters, forward FLOPs and output bytes of every unit. [1]

    They are for the first micro-batch, which is never smaller than the others. A multiply-add
    counts as 2 FLOPs, only matrix products count (Narayanan et al. 2021, appendix): per token 2 x
    weights of the linear layers, and 4 x S x D for the two products of attention (not halved for
    the causal mask, since none of the implementations skips masked scores).
    """
    # `size` is what a unit holds, `products` what of it multiplies: of the embedding nothing, of a
    # tied head a matrix that it does not hold.
    size = dict.fromkeys(unit_names(model), 0)
    products = dict.fromkeys(unit_names(model), 0)
    for name, shape in parameter_shapes(model).items():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        size[unit_of(name)] += count
        if len(shape) == 2 and not name.startswith("embedding."):  # a lookup is no product
            products[unit_of(name)] += count
    if model.tied_head:
        products["head"] = model.d_model * model.vocab_size  # its weight counts as the embedding's
    tokens = train.micro_batch_size * model.context_length
    element_bytes = ELEMENT_BYTES[train.dtype]
    costs = []
    for unit in size:
        flops = 2 * products[unit] * tokens
        if unit.startswith("block."):
            flops += 4 * model.context_length * model.d_model * tokens
        # The head's output never leaves its stage as logits: what leaves is the loss, one number.
        output_bytes = element_bytes if unit == "head" else element_bytes * tokens * model.d_model
        costs.append(UnitCost(unit, size[unit], flops, output_bytes))
    return costs


def plan_partition(config: RunConfig) -> PartitionPlan:
    """Return the plan that `config.partition` asks for, over the schedule's virtual stages.

    A balanced plan of several chunks depends on the devices that the schedule gives them. Raises
    ScheduleError if there is no such schedule.
    """
    units = unit_names(config.model)
    match config.partition:
        case "even":
            # Only a file's devices may hold unlike numbers of chunks.
            is_file = config.schedule.startswith("file:")
            grid = schedule_of(config).grid if is_file else (config.stages, config.chunks)
            inner = even_boundaries(config.model.num_layers, *grid)
        case "balanced":
            # A backward costs twice its forward in every unit, so forward FLOPs order the plans.
            costs = [cost.forward_flops for cost in unit_costs(config.model, config.train)]
            if config.chunks == 1:
                devices = list(range(config.stages))
            else:
                devices = [device for device, _ in schedule_of(config).location]
            inner = balanced(costs, devices)
        case boundaries:  # the user's own, validated by `RunConfig`
            inner = list(boundaries)
    edges = [0, *inner, len(units)]
    return PartitionPlan(tuple(tuple(units[a:b]) for a, b in itertools.pairwise(edges)))


def balanced(costs: Sequence[float], devices: Sequence[int]) -> list[int]:
    """Return the boundaries of the balanced plan. `devices[k]` is the device of part k.

    `costs` are of the embedding, so many blocks that cost the same, and the head.
    """
    if len(set(devices)) == len(devices):
        return balanced_boundaries(costs, len(devices))
    return balanced_over_devices(costs[0], costs[1], costs[-1], len(costs) - 2, devices)


def even_boundaries(num_layers: int, stages: int, chunks: int = 1) -> list[int]:
    """Spread the blocks as evenly as possible, embedding in the first part, head in the last. [2]

    A remainder goes to the middle stages first, since the outer ones also hold the embedding and
    the head; with several chunks, to one chunk of every stage after another. That works for both
    placements: any `stages` parts in a row are on `stages` different devices. With more parts than
    blocks the units themselves are spread evenly, so that no part is empty.

    6 blocks over 4 stages: 1 2 2 1, so the boundaries are [2, 4, 6] (the embedding is unit 0).
    """
    parts = stages * chunks
    if parts > num_layers:
        num_units = num_layers + 2
        return [round(k * num_units / parts) for k in range(1, parts)]
    # 7 blocks over 4 stages: 1 each, and 3 left, which go to stages 1, 2 and then 0.
    base, extra = divmod(num_layers, parts)
    # By distance from the middle; doubled, so that it is a whole number for an even `stages` too.
    from_the_middle = sorted(range(stages), key=lambda k: abs(2 * k - (stages - 1)))
    order = [chunk * stages + k for chunk in range(chunks) for k in from_the_middle]
    counts = [base + (k in order[:extra]) for k in range(parts)]
    return [1 + blocks for blocks in itertools.accumulate(counts)][:-1]


def balanced_boundaries(costs: Sequence[float], parts: int) -> list[int]:
    """Return the boundaries with the smallest possible largest part. [3]

    The slowest stage sets the pace of a pipeline (time = sum t_i + (m - 1) max t_i), so the largest
    part is minimised, not the variance. Among equals the last cut is as late as possible, then the
    one before it, and so on. Costs are 0 or more. Raises ValueError for more parts than units.

    Dynamic programming over (parts, units): best(k, end), the smallest largest part when the first
    `end` units are cut into k parts, is the minimum over the last part's start of

        max(best(k - 1, start), cost of units start to end)
             grows with start     shrinks with start

    so the minimum is where the two cross. That point only moves right as `end` grows: O(1)
    amortised for each, O(units x parts x log units) in all with the search for the latest cut.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parts = {parts}; expected 1 to {n}, the number of units")
    # total[b] - total[a] is what units a to b - 1 cost, without adding them up again.
    total = [0.0, *itertools.accumulate(float(cost) for cost in costs)]
    best = [0.0] + [math.inf] * n  # best[end], for k = 0 parts
    cuts = []  # cuts[k - 1][end]: where the last of k parts starts
    for k in range(1, parts + 1):
        before, best, cut = best, [math.inf] * (n + 1), [0] * (n + 1)
        start = k - 1
        # Every part needs a unit: k parts take at least k, and parts - k units stay for the others.
        # Costs 1 1 4 1 in two parts: the first may end behind unit 0, 1 or 2. It ends behind unit
        # 1, since 1 + 1 and 4 + 1 have the smallest largest part, 5.
        for end in range(k, n - (parts - k) + 1):
            # The crossing: the first `start` whose parts before are no smaller than the last one.
            while start < end and before[start] < total[end] - total[start]:
                start += 1
            largest = before[start] if start < end else math.inf
            if start > k - 1:  # one before the crossing the last part decides; that may be smaller
                largest = min(largest, total[end] - total[start - 1])
            # The latest start that is no worse: best(k - 1, .) grows, so a bisection finds it.
            best[end], cut[end] = largest, bisect_right(before, largest, k - 1, end) - 1
        cuts.append(cut)
    boundaries, end = [], n  # walk back from the last part's start to the first's
    for cut in reversed(cuts[1:]):
        end = cut[end]
        boundaries.append(end)
    return boundaries[::-1]


def balanced_over_devices(
    embedding: float, block: float, head: float, num_layers: int, devices: Sequence[int]
) -> list[int]:
    """Return the boundaries with the smallest largest device, then smallest largest part. [4]

    `devices[k]` is the device of part k, of two or more. All blocks cost the same, so only their
    numbers count. Every inner part gets one, so that none is empty; every other block goes to the
    device that has the least.

    That is exact. Let the greedy fill end with device d the fullest. When d got its last block, no
    device with room had less than d. So a cut that puts fewer blocks on d puts one more on some
    other device, which is then as full as d is now.

    Among the cuts with that largest device, the smallest largest part is wanted. A bound on the
    parts is a bound on a device's room, under which the same proof holds; the smallest that keeps
    the largest device is found by bisection. O(layers x log parts x log layers).
    """
    # The inner parts begin with a block each; the outer ones have the embedding and the head.
    last = len(devices) - 1
    least = [0, *[1] * (last - 1), 0]

    def fill(bound: float) -> tuple[float, list[int]]:
        """Return the largest device and each part's blocks, within `bound`, or infinity."""
        counts, sizes = least.copy(), [embedding, *[block] * (last - 1), head]
        # Two heaps (a sorted list is one): the devices by load, and each device's parts by size.
        parts = {
            d: sorted((sizes[k], k) for k in range(last + 1) if devices[k] == d)
            for d in set(devices)
        }
        loads: list[tuple[float, int]] = sorted(
            (sum(size for size, _ in own), d) for d, own in parts.items()
        )
        for _ in range(num_layers - sum(least)):
            while loads and parts[loads[0][1]][0][0] + block > bound:
                heappop(loads)  # no room on this device
            if not loads:
                return math.inf, counts
            load, device = loads[0]
            size, part = parts[device][0]
            heapreplace(loads, (load + block, device))
            heapreplace(parts[device], (size + block, part))
            counts[part] += 1
        # Of the devices, whose pace it is; `bound` was one of the parts alone.
        largest = max(sum(size for size, _ in own) for own in parts.values())
        return (math.inf if max(sizes) > bound else largest), counts

    # A largest part is an embedding, a head or neither, and some blocks: these are all its values.
    bounds = sorted(
        {own + n * block for own in (0, embedding, head) for n in range(num_layers + 1)}
    )
    best, _ = fill(bounds[-1])
    bound = bounds[bisect_left(bounds, True, key=lambda bound: fill(bound)[0] <= best)]
    return [1 + blocks for blocks in itertools.accumulate(fill(bound)[1])][:-1]
