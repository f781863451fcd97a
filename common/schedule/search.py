"""Finds a schedule with little bubble from profiled costs and an activation-memory limit per stage.

Two layers. The inner one, `build`, lays the pipeline out in time, greedily: B before F before W, within the memory limit.
What makes a greedy order good or bad is when it waits instead of starting what it could: a forward started just before a
backward arrives delays that backward, and with it every stage above. So each stage has five numbers (`Knobs`), and the
outer layer looks for good ones: first a grid with the same numbers for all stages, then random changes that are kept if
they are no worse. The number of trials depends on the size only, so that a search gives the same result everywhere.

The measure is the makespan with a warm start (each stage's clock begins with its first forward), the one by which the Zero
Bubble paper (Qi et al. 2024) reports its searched schedules ZB-1p and ZB-2p; then the plain makespan.

Memory: F adds one activation, B frees all but `Costs.kept_by_backward_input` of it, W frees the rest.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common.schedule.action import Action, Op, Schedule, ScheduleError
from common.schedule.simulate import Costs, simulate
from common.schedule.zero_bubble import zb_h1, zb_h2

ACTIONS_TO_TRY = 4_000_000
"""How many actions the search lays out in all, a few layouts at least."""
MIN_TRIALS, MAX_TRIALS = 12, 3000
_INFINITY = math.inf
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Knobs:
    """What one stage's greedy order depends on."""

    most_in_flight: int
    """No F with this many forwards waiting for their B."""
    most_backlog: float
    """More Bs than this waiting for their W: W comes before F."""
    forward_patience: float
    """Rather than start F, wait for a B that arrives within this time."""
    weight_patience: float
    """Rather than start W, wait for an F or B that arrives within this time."""
    allowance: float
    """No waiting beyond this idle time in all: what another stage must idle anyway costs nothing here."""


@dataclass(frozen=True)
class Layout:
    """A greedy order with its measures."""

    rows: list[list[Op]]
    warm_makespan: float
    makespan: float
    idle: float

    @property
    def score(self) -> tuple[float, float, float]:
        return self.warm_makespan, self.makespan, self.idle


def search(
    p: int, m: int, costs: Costs, memory_limit: Sequence[float], actions_to_try: int = ACTIONS_TO_TRY
) -> Schedule:
    """The best schedule found for m micro-batches; `memory_limit` is in activations, one number per stage.

    It keeps every operation in the order of the micro-batches. Raises ScheduleError if not even one activation fits.
    """
    if len(memory_limit) != p or costs.num_stages != p:
        raise ScheduleError(f"{len(memory_limit)} memory limits and costs of {costs.num_stages} stages for {p} stages")
    if not all(limit >= 1 for limit in memory_limit):
        raise ScheduleError(f"memory limit {min(memory_limit):g} activations; expected 1 or more on every stage")
    memory_limit = [min(limit, m) for limit in memory_limit]  # there are no more than m activations
    good_enough = lower_bound(m, costs, memory_limit) * (1 + _ROUNDING)
    # The handcrafted schedules are candidates too, where they fit.
    candidates = [s for s in (zb_h1(p, m), zb_h2(p, m)) if _fits(s, costs, memory_limit)]
    if not any(_measure(s, costs)[0] <= good_enough for s in candidates):
        candidates.append(_schedule(_best_layout(p, m, costs, memory_limit, actions_to_try, good_enough), m))
    return replace(min(candidates, key=lambda s: _measure(s, costs)), name="search")


def limits(p: int, m: int, memory_limit: Sequence[float]) -> list[float]:
    """Activations per stage from a limit in units of 1F1B's peak, min(p, m): one number for all, or one per stage.

    Never more than m, which is all there are.
    """
    if len(memory_limit) not in (1, p):
        raise ScheduleError(f"memory limit: {len(memory_limit)} numbers for {p} stages; expected 1 or {p}")
    each = memory_limit if len(memory_limit) == p else [memory_limit[0]] * p
    return [min(limit * min(p, m), m) for limit in each]


def _measure(schedule: Schedule, costs: Costs) -> tuple[float, float]:
    simulation = simulate(schedule, costs, check=False)
    return simulation.warm_makespan, simulation.makespan


def _fits(schedule: Schedule, costs: Costs, memory_limit: Sequence[float]) -> bool:
    peak = simulate(schedule, costs, check=False).peak_memory_per_stage
    return all(held <= limit + _ROUNDING for held, limit in zip(peak, memory_limit, strict=True))


def _schedule(layout: Layout, m: int) -> Schedule:
    devices = []
    for row in layout.rows:
        done = dict.fromkeys(Op, 0)
        actions = []
        for op in row:
            actions.append(Action(op, done[op]))
            done[op] += 1
        devices.append(tuple(actions))
    return Schedule("search", tuple(devices), m)


def _best_layout(
    p: int, m: int, costs: Costs, memory_limit: Sequence[float], actions_to_try: int, good_enough: float
) -> Layout:
    trials = min(max(actions_to_try // (3 * p * m), MIN_TRIALS), MAX_TRIALS)
    best: Layout | None = None
    knobs: list[Knobs] = []
    for trial, candidate in enumerate(_grid(p, m, costs, memory_limit)):
        if trial >= trials:
            break
        layout = build(m, costs, memory_limit, candidate)
        if best is None or layout.score < best.score:
            best, knobs = layout, candidate
    assert best is not None
    chance = random.Random(p * m)
    for _ in range(trials):
        if best.warm_makespan <= good_enough:
            break
        candidate = _changed(knobs, costs, memory_limit, m, chance)
        layout = build(m, costs, memory_limit, candidate)
        if layout.score <= best.score:
            best, knobs = layout, candidate
    return best


def _grid(p: int, m: int, costs: Costs, memory_limit: Sequence[float]) -> Iterator[list[Knobs]]:
    """The same knobs for all stages, in units of their costs; the usual good ones first."""
    # Twice the distance to the end is what the wait for the first backward has room for.
    caps = [
        [min(int(limit), 2 * (p - d)) for d, limit in enumerate(memory_limit)],
        [int(limit) for limit in memory_limit],
    ]
    unavoidable = max(0.0, lower_bound(m, costs, memory_limit) - m * float(costs.per_micro_batch.max()))
    for allowance in (unavoidable, unavoidable + 0.25 * max(costs.forward), 2 * unavoidable, _INFINITY):
        for f in (1.0, 0.1, 0.0, 0.25, 0.5):
            for w in (0.0, 0.25, 0.75):
                for cap in caps:
                    yield [
                        Knobs(cap[d], _INFINITY, f * costs.forward[d], w * costs.backward_weight[d], allowance)
                        for d in range(p)
                    ]


def _changed(
    knobs: list[Knobs], costs: Costs, memory_limit: Sequence[float], m: int, chance: random.Random
) -> list[Knobs]:
    """One to three knobs of random stages with new values."""
    changed = list(knobs)
    for _ in range(chance.choice((1, 1, 2, 3))):
        d = chance.randrange(len(knobs))
        longest = max(costs.forward[d], costs.backward_weight[d])
        match chance.randrange(5):
            case 0:
                changed[d] = replace(changed[d], most_in_flight=chance.randint(1, int(memory_limit[d])))
            case 1:
                changed[d] = replace(changed[d], most_backlog=chance.choice((_INFINITY, chance.randint(0, m))))
            case 2:
                patience = costs.forward[d] * chance.random() * chance.random()
                changed[d] = replace(changed[d], forward_patience=patience)
            case 3:
                patience = longest * chance.random() * chance.random()
                changed[d] = replace(changed[d], weight_patience=patience)
            case 4:
                allowance = chance.choice((_INFINITY, costs.forward[d] * chance.random() * 2))
                changed[d] = replace(changed[d], allowance=allowance)
    return changed


def build(m: int, costs: Costs, memory_limit: Sequence[float], knobs: Sequence[Knobs]) -> Layout:
    """The greedy order for these knobs, laid out in time: a device is looked at when it becomes free or gets a message."""
    p = len(knobs)
    kept = costs.kept_by_backward_input
    forward_end: list[list[float]] = [[] for _ in range(p)]
    backward_end: list[list[float]] = [[] for _ in range(p)]
    weights_done, free, idle = [0] * p, [0.0] * p, [0.0] * p
    rows: list[list[Op]] = [[] for _ in range(p)]
    events = [(0.0, 0)]
    while events:
        now, d = heapq.heappop(events)
        if now < free[d]:
            continue
        forwards, backwards, weights = len(forward_end[d]), len(backward_end[d]), weights_done[d]
        in_flight, backlog = forwards - backwards, backwards - weights
        forward_ready = backward_ready = _INFINITY
        if in_flight:
            if d == p - 1:
                backward_ready = forward_end[d][backwards]
            elif len(backward_end[d + 1]) > backwards:
                backward_ready = backward_end[d + 1][backwards] + costs.communication[d + 1]
        knob = knobs[d]
        fits = in_flight + kept * backlog + 1 <= memory_limit[d] + _ROUNDING
        if forwards < m and fits and in_flight < knob.most_in_flight:
            if d == 0:
                forward_ready = 0.0
            elif len(forward_end[d - 1]) > forwards:
                forward_ready = forward_end[d - 1][forwards] + costs.communication[d - 1]
        wake = min(forward_ready, backward_ready)
        if backward_ready <= now:
            op = Op.B
        elif backlog > knob.most_backlog:
            op = Op.W
        elif forward_ready <= now:
            if backward_ready <= now + min(knob.forward_patience, knob.allowance - idle[d]):
                heapq.heappush(events, (backward_ready, d))
                continue
            op = Op.F
        elif backlog and wake > now + min(knob.weight_patience, knob.allowance - idle[d]):
            op = Op.W
        else:
            if wake < _INFINITY:
                heapq.heappush(events, (wake, d))
            continue
        if rows[d]:
            idle[d] += now - free[d]
        rows[d].append(op)
        if op is Op.F:
            end = now + costs.forward[d]
            forward_end[d].append(end)
            neighbour = d + 1
        elif op is Op.B:
            end = now + costs.backward_input[d]
            backward_end[d].append(end)
            neighbour = d - 1
        else:
            end = now + costs.backward_weight[d]
            weights_done[d] += 1
            neighbour = -1
        if 0 <= neighbour < p:
            heapq.heappush(events, (end + costs.communication[d], neighbour))
        free[d] = end
        heapq.heappush(events, (end, d))
    if min(weights_done) < m:
        return Layout(rows, _INFINITY, _INFINITY, _INFINITY)
    work = costs.per_micro_batch * m
    return Layout(rows, max(w + i for w, i in zip(work.tolist(), idle, strict=True)), max(free), sum(idle))


def lower_bound(m: int, costs: Costs, memory_limit: Sequence[float]) -> float:
    """No schedule has a smaller makespan with a warm start than this, whatever its order.

    The largest, over stages d, of what d's window must hold between its first forward and its last action:
    its work; the wait for the first backward, which only the forwards that fit in memory can fill; the last backward of a
    stage below, with the way there and back; the way of the last forward there and back, which can start only when
    memory allows; and the memory that all micro-batches occupy, spread over the limit.
    """
    p, kept = costs.num_stages, costs.kept_by_backward_input
    memory_limit = [min(limit, m) for limit in memory_limit]
    forward, backward, weight, hop = costs.forward, costs.backward_input, costs.backward_weight, costs.communication
    down = [forward[d] + hop[d] for d in range(p)]  # until the next stage can start its forward
    up = [hop[d + 1] + backward[d] if d < p - 1 else 0.0 for d in range(p)]  # from the next stage's backward to the own
    bounds = [0.0]
    wait = [0.0] * p  # of the first backward, in which a stage is idle
    round_trip = [0.0] * p  # from the start of F to the start of B
    for d in reversed(range(p)):
        below = down[d] + round_trip[d + 1] + backward[d + 1] + hop[d + 1] if d < p - 1 else forward[d]
        round_trip[d] = below
        wait[d] = max(0.0, below - min(m, math.floor(memory_limit[d] + _ROUNDING)) * forward[d])
    for d in range(p):
        bounds.append(wait[d] + m * float(costs.per_micro_batch[d]))
        held = m * (round_trip[d] + backward[d] + kept * weight[d])
        bounds.append(held / memory_limit[d])
        bounds.append(_last_forward(m, costs, memory_limit[d], d, wait[d]) + round_trip[d] + backward[d] + weight[d])
        for e in range(d, p):
            # Before the last forward, even if all other backwards are done.
            forced = _weights_to_free(1 + kept * (m - 1) - memory_limit[e], kept, m - 1)
            last = m * (forward[e] + backward[e]) + wait[e] + forced * weight[e]
            bounds.append(sum(down[d:e]) + last + sum(up[d:e]) + weight[d])
    return max(bounds)


def _last_forward(m: int, costs: Costs, limit: float, d: int, wait: float) -> float:
    """The earliest start of stage d's last forward: what must be freed before it, for the least time."""
    kept = costs.kept_by_backward_input
    earliest = _INFINITY
    for backwards in range(m):
        weights = _weights_to_free(m - backwards + kept * backwards - limit, kept, backwards)
        if weights <= backwards:
            spent = backwards * costs.backward_input[d] + weights * costs.backward_weight[d]
            earliest = min(earliest, (m - 1) * costs.forward[d] + spent + (wait if backwards else 0.0))
    return earliest


def _weights_to_free(over: float, kept: float, most: int) -> int:
    """How many Ws free `over` activations; more than `most` if that many do not."""
    over -= _ROUNDING
    if over <= 0:
        return 0
    return math.ceil(over / kept) if over <= kept * most else most + 1
