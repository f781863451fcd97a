"""Search for a schedule with little bubble, given profiled costs and a memory limit per stage.

    knobs ──► [1] build: a greedy order, laid out in time ──► [2] its score ──► [3] keep the best
      ▲                                                                              │
      └────────────── [4] a grid first, then random changes of the best ◄────────────┘

[1] `build` plays the pipeline forward in time. A device that is free takes B before F before W,
    and F only within its memory limit.
[2] The score is the makespan with a warm start (each stage's clock begins with its first forward),
    by which the Zero Bubble paper (Qi et al. 2024) reports its searched schedules ZB-1p and ZB-2p;
    then the plain makespan; then the idle time.
[3] The search ends early once a layout reaches `lower_bound`, which no schedule can beat.
[4] What makes a greedy order good or bad is when it waits although it could start something: a
    forward started just before a backward arrives delays that backward, and with it every stage
    above. Five numbers per stage (`Knobs`) say when to wait. Changes that are no worse are kept.
    The number of trials depends on the size alone, never on the clock, so that a search gives the
    same schedule on every machine.

Memory is counted in activations of one micro-batch: F adds 1, B frees all of it but
`Costs.kept_by_backward_input`, W frees the rest.

Example: 2 stages, 3 micro-batches, F = B = W = 1, messages take no time, at most 2 activations per
stage, of which B keeps half for W. `lower_bound` is 10, and ZB-H1 reaches it:

    time      0   1   2   3   4   5   6   7   8   9   10
    device 0  F0  F1  ·   B0  W0  F2  B1  W1  B2  W2       10 after its first forward began
    device 1  ·   F0  B0  F1  B1  W0  F2  B2  W1  W2        9 after its first forward began

Device 0 has 3 (F + B + W) = 9 to do. Its first B must wait for F0 here, F0 there and B0 there, so
it starts 3 after its first F. Two forwards fill 2 of these 3, the limit forbids a third, 1 is idle:
9 + 1 = 10.

With room for 3 activations F2 fills the gap, the bound falls to 9, and the search finds a schedule
of 9.
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
"""How many actions the search lays out in all, but never fewer than MIN_TRIALS layouts."""
MIN_TRIALS, MAX_TRIALS = 12, 3000
_INFINITY = math.inf
_ROUNDING = 1e-9  # sums of costs and of shares of activations may be off by this much


@dataclass(frozen=True, slots=True)
class Knobs:
    """When one stage waits and what it prefers. Times are in the unit of the costs."""

    most_in_flight: int
    """Start no F while this many forwards wait for their B."""
    most_backlog: float
    """Run W before F once more than this many Bs wait for their W."""
    forward_patience: float
    """Wait for a B that arrives within this time rather than start F."""
    weight_patience: float
    """Wait for an F or B that arrives within this time rather than start W."""
    allowance: float
    """Wait no more once idle for this long in all. What the slowest stage must idle anyway is
    free."""


@dataclass(frozen=True)
class Layout:
    """A greedy order and its measures, in the unit of the costs; all infinite if it never ended."""

    rows: list[list[Op]]  # by stage; the n-th F of a row is of micro-batch n, and so for B and W
    warm_makespan: float
    makespan: float
    idle: float

    @property
    def score(self) -> tuple[float, float, float]:
        return self.warm_makespan, self.makespan, self.idle


def search(
    p: int,
    m: int,
    costs: Costs,
    memory_limit: Sequence[float],
    actions_to_try: int = ACTIONS_TO_TRY,
) -> Schedule:
    """Return the best schedule found for p stages and m micro-batches.

    `memory_limit` is in activations of one micro-batch, one number per stage. Every operation keeps
    the order of the micro-batches. Raises ScheduleError if the numbers are not of p stages, or if
    not even one activation fits.
    """
    if len(memory_limit) != p or costs.num_stages != p:
        raise ScheduleError(
            f"{len(memory_limit)} memory limits and costs of {costs.num_stages} stages for "
            f"{p} stages"
        )
    if not all(limit >= 1 for limit in memory_limit):
        raise ScheduleError(
            f"memory limit {min(memory_limit):g} activations; expected 1 or more on every stage"
        )
    memory_limit = [min(limit, m) for limit in memory_limit]  # there are no more than m activations
    good_enough = lower_bound(m, costs, memory_limit) * (1 + _ROUNDING)
    # The handcrafted schedules are candidates too, where they fit.
    candidates = [s for s in (zb_h1(p, m), zb_h2(p, m)) if _fits(s, costs, memory_limit)]
    if not any(_measure(s, costs)[0] <= good_enough for s in candidates):
        candidates.append(
            _schedule(_best_layout(p, m, costs, memory_limit, actions_to_try, good_enough), m)
        )
    return replace(min(candidates, key=lambda s: _measure(s, costs)), name="search")


def limits(p: int, m: int, memory_limit: Sequence[float]) -> list[float]:
    """Convert limits in units of 1F1B's peak, min(p, m), to activations per stage.

    `memory_limit` holds one number for all stages or one for each. The result never exceeds m,
    which is all there are. Raises ScheduleError for any other count.
    """
    if len(memory_limit) not in (1, p):
        raise ScheduleError(
            f"memory limit: {len(memory_limit)} numbers for {p} stages; expected 1 or {p}"
        )
    each = memory_limit if len(memory_limit) == p else [memory_limit[0]] * p
    return [min(limit * min(p, m), m) for limit in each]


def _measure(schedule: Schedule, costs: Costs) -> tuple[float, float]:
    """Simulate, so that handcrafted schedules and layouts are measured by the same code."""
    simulation = simulate(schedule, costs, check=False)
    return simulation.warm_makespan, simulation.makespan


def _fits(schedule: Schedule, costs: Costs, memory_limit: Sequence[float]) -> bool:
    peak = simulate(schedule, costs, check=False).peak_memory_per_stage
    return all(held <= limit + _ROUNDING for held, limit in zip(peak, memory_limit, strict=True))


def _schedule(layout: Layout, m: int) -> Schedule:
    """Number the operations of every row: the n-th F is of micro-batch n, and so for B and W."""
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
    p: int,
    m: int,
    costs: Costs,
    memory_limit: Sequence[float],
    actions_to_try: int,
    good_enough: float,
) -> Layout:
    """Try the grid, then random changes of the best knobs so far, `trials` of each at most."""
    # A layout has 3 p m actions.
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
    chance = random.Random(p * m)  # seeded by the size: the same search gives the same schedule
    for _ in range(trials):
        if best.warm_makespan <= good_enough:
            break
        candidate = _changed(knobs, costs, memory_limit, m, chance)
        layout = build(m, costs, memory_limit, candidate)
        if layout.score <= best.score:  # equal counts too: a walk along a plateau may find its end
            best, knobs = layout, candidate
    return best


def _grid(p: int, m: int, costs: Costs, memory_limit: Sequence[float]) -> Iterator[list[Knobs]]:
    """Yield the same knobs for all stages, in units of their costs; the usually good ones first."""
    # The first B comes back to stage d after p - d forwards and as many backwards: with F = B, room
    # for 2 (p - d) Fs.
    caps = [
        [min(int(limit), 2 * (p - d)) for d, limit in enumerate(memory_limit)],
        [int(limit) for limit in memory_limit],
    ]
    # What the slowest stage must idle. A stage that waits no longer than that does not lengthen the
    # step.
    unavoidable = max(
        0.0, lower_bound(m, costs, memory_limit) - m * float(costs.per_micro_batch.max())
    )
    for allowance in (
        unavoidable,
        unavoidable + 0.25 * max(costs.forward),
        2 * unavoidable,
        _INFINITY,
    ):
        for f in (1.0, 0.1, 0.0, 0.25, 0.5):
            for w in (0.0, 0.25, 0.75):
                for cap in caps:
                    yield [
                        Knobs(
                            cap[d],
                            _INFINITY,
                            f * costs.forward[d],
                            w * costs.backward_weight[d],
                            allowance,
                        )
                        for d in range(p)
                    ]


def _changed(
    knobs: list[Knobs], costs: Costs, memory_limit: Sequence[float], m: int, chance: random.Random
) -> list[Knobs]:
    """Give one to three knobs of random stages new values."""
    changed = list(knobs)
    for _ in range(chance.choice((1, 1, 2, 3))):
        d = chance.randrange(len(knobs))
        longest = max(costs.forward[d], costs.backward_weight[d])
        match chance.randrange(5):
            case 0:
                changed[d] = replace(
                    changed[d], most_in_flight=chance.randint(1, int(memory_limit[d]))
                )
            case 1:
                changed[d] = replace(
                    changed[d], most_backlog=chance.choice((_INFINITY, chance.randint(0, m)))
                )
            case 2:  # the product of two draws favours short waits
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
    """Lay out the greedy order for these knobs in time.

    `memory_limit` (in activations) and `knobs` have one entry per stage. The measures are infinite
    if the pipeline stands still before all is done, which happens where knobs forbid every action
    that is left.
    """
    return _Pipeline(m, costs, memory_limit, knobs).run()


class _Pipeline:
    """The pipeline while `build` lays it out: what every stage has done, and until when.

    It is driven by events (time, stage), each a reason to look at a stage: it becomes free, gets a
    message, or has waited long enough.

        [1] take the earliest event; skip it if the stage is busy (its own end is an event too)
        [2] when can the stage's next B and its next F start?
        [3] choose B, F or W; or nothing, and look again later
        [4] run what was chosen: its end is an event of this stage, the arrival of its message one
            of the neighbour
    """

    def __init__(
        self,
        m: int,
        costs: Costs,
        memory_limit: Sequence[float],
        knobs: Sequence[Knobs],
    ) -> None:
        p = len(knobs)
        self.p, self.m, self.costs, self.memory_limit, self.knobs = p, m, costs, memory_limit, knobs
        # When each stage's n-th F and n-th B ended. Their lengths count what is done; W needs no
        # more than the count.
        self.forward_end: list[list[float]] = [[] for _ in range(p)]
        self.backward_end: list[list[float]] = [[] for _ in range(p)]
        self.weights_done = [0] * p
        self.free = [0.0] * p  # the end of each stage's last action
        self.idle = [0.0] * p  # since its first action
        self.rows: list[list[Op]] = [[] for _ in range(p)]
        self.events = [(0.0, 0)]  # a heap; only stage 0 can start without a message

    def run(self) -> Layout:
        while self.events:
            now, d = heapq.heappop(self.events)  # [1]
            if now < self.free[d]:
                continue
            op, look_again = self._choose(d, now, self._forward_ready(d), self._backward_ready(d))
            if op is not None:
                self._run_action(d, op, now)
            elif look_again < _INFINITY:
                heapq.heappush(self.events, (look_again, d))
        return self._layout()

    def _forward_ready(self, d: int) -> float:
        """Return when stage d's next F can start; infinity while its input or room is lacking.
        [2]"""
        forwards, backwards = len(self.forward_end[d]), len(self.backward_end[d])
        in_flight, backlog = forwards - backwards, backwards - self.weights_done[d]
        held = in_flight + self.costs.kept_by_backward_input * backlog
        if (
            forwards == self.m
            or held + 1 > self.memory_limit[d] + _ROUNDING
            or in_flight >= self.knobs[d].most_in_flight
        ):
            return _INFINITY
        if d == 0:
            return 0.0
        return _arrival(self.forward_end[d - 1], forwards, self.costs.communication[d - 1])

    def _backward_ready(self, d: int) -> float:
        """Return when stage d's next B can start; infinity while its gradient is unknown. [2]"""
        backwards = len(self.backward_end[d])
        if backwards == len(self.forward_end[d]):
            return _INFINITY
        if d == self.p - 1:
            return self.forward_end[d][backwards]  # the loss is here
        return _arrival(self.backward_end[d + 1], backwards, self.costs.communication[d + 1])

    def _choose(
        self,
        d: int,
        now: float,
        forward_ready: float,
        backward_ready: float,
    ) -> tuple[Op | None, float]:
        """Return what stage d starts now, or None and when to look again. [3]"""
        knob = self.knobs[d]
        backlog = len(self.backward_end[d]) - self.weights_done[d]
        may_idle = knob.allowance - self.idle[d]
        wake = min(forward_ready, backward_ready)
        if backward_ready <= now:  # every stage above waits for this one
            return Op.B, now
        if backlog > knob.most_backlog:
            return Op.W, now
        if forward_ready <= now:
            if backward_ready <= now + min(knob.forward_patience, may_idle):
                return None, backward_ready
            return Op.F, now
        if backlog and wake > now + min(knob.weight_patience, may_idle):
            return Op.W, now  # nothing else comes soon
        return None, wake  # a message that is not yet known brings its own event

    def _run_action(self, d: int, op: Op, now: float) -> None:
        """Let stage d do `op` from now on, and note who has to look when. [4]"""
        if self.rows[d]:  # the clock of a warm start begins with the first action
            self.idle[d] += now - self.free[d]
        self.rows[d].append(op)
        if op is Op.F:
            end = now + self.costs.forward[d]
            self.forward_end[d].append(end)
            neighbour = d + 1
        elif op is Op.B:
            end = now + self.costs.backward_input[d]
            self.backward_end[d].append(end)
            neighbour = d - 1
        else:
            end = now + self.costs.backward_weight[d]
            self.weights_done[d] += 1
            neighbour = -1  # nobody waits for W
        if 0 <= neighbour < self.p:
            heapq.heappush(self.events, (end + self.costs.communication[d], neighbour))
        self.free[d] = end
        heapq.heappush(self.events, (end, d))

    def _layout(self) -> Layout:
        if min(self.weights_done) < self.m:
            return Layout(self.rows, _INFINITY, _INFINITY, _INFINITY)
        work = (self.costs.per_micro_batch * self.m).tolist()  # (p,)
        warm_makespan = max(w + i for w, i in zip(work, self.idle, strict=True))
        return Layout(self.rows, warm_makespan, max(self.free), sum(self.idle))


def _arrival(ends: list[float], number: int, communication: float) -> float:
    """Return when the message of a neighbour's n-th action arrives; infinity before it has run."""
    return ends[number] + communication if len(ends) > number else _INFINITY


def lower_bound(m: int, costs: Costs, memory_limit: Sequence[float]) -> float:
    """Return a makespan with a warm start that no schedule can beat, whatever its order.

    Stage d's window runs from its first forward to its last action. Four things must fit into it:

        [a] work    its own work, and the idle part of its wait for the first backward: only
                    forwards can fill that wait, and only as many as fit in memory
        [b] memory  every micro-batch holds an activation for a while; the limit says how many
                    at a time
        [c] last F  stage d's last forward can start only when memory allows; its backward comes
                    a round trip later, then its W
        [d] last B  the same seen from stage e, d or one below it: down to e, all of e's F
                    and B, back up, then a W

    The largest over all stages is the bound. In the example at the top of this file stage 0 has a
    round trip of F + F + B = 3 and a limit of 2, hence an idle wait of 3 - 2 F = 1:

        [a] 1 + 3 (F + B + W) = 10
        [b] 3 (3 + B + W / 2) / 2 = 6.75   held whole for the round trip and B, half during W
        [c] 5 + 3 + B + W = 10             F2 at 5: after F0, F1, idle 1, B0 and W0; then B2, W2
        [d] F + 3 (F + B) + B + W = 9      e = 1: down, all of its F and B, back up, W2
    """
    p, kept = costs.num_stages, costs.kept_by_backward_input
    memory_limit = [min(limit, m) for limit in memory_limit]
    forward, backward, weight, hop = (
        costs.forward,
        costs.backward_input,
        costs.backward_weight,
        costs.communication,
    )
    down = [forward[d] + hop[d] for d in range(p)]  # until the next stage can start its forward
    up = [
        hop[d + 1] + backward[d] if d < p - 1 else 0.0 for d in range(p)
    ]  # from the next stage's backward to the own
    bounds = [0.0]
    wait = [0.0] * p  # the part of the round trip that no forward can fill
    round_trip = [0.0] * p  # from the start of F to the start of B
    for d in reversed(range(p)):
        below = (
            down[d] + round_trip[d + 1] + backward[d + 1] + hop[d + 1] if d < p - 1 else forward[d]
        )
        round_trip[d] = below
        wait[d] = max(0.0, below - min(m, math.floor(memory_limit[d] + _ROUNDING)) * forward[d])
    for d in range(p):
        bounds.append(wait[d] + m * float(costs.per_micro_batch[d]))  # [a]
        held = m * (round_trip[d] + backward[d] + kept * weight[d])  # activations x time
        bounds.append(held / memory_limit[d])  # [b]
        last_forward = _last_forward(m, costs, memory_limit[d], d, wait[d])
        bounds.append(last_forward + round_trip[d] + backward[d] + weight[d])  # [c]
        for e in range(d, p):  # [d]
            # Ws that must come before e's last forward to make room for it, even if all other
            # backwards are done.
            forced = _weights_to_free(1 + kept * (m - 1) - memory_limit[e], kept, m - 1)
            last = m * (forward[e] + backward[e]) + wait[e] + forced * weight[e]
            bounds.append(sum(down[d:e]) + last + sum(up[d:e]) + weight[d])
    return max(bounds)


def _last_forward(m: int, costs: Costs, limit: float, d: int, wait: float) -> float:
    """Return the earliest start of stage d's last forward, after its first.

    The other m - 1 forwards come before it. Room for it is made by some Bs, each with fewer or more
    Ws; the cheapest mix counts. Any B at all means that the wait for the first one is over.
    """
    kept = costs.kept_by_backward_input
    earliest = _INFINITY
    for backwards in range(m):
        # Held with the last F: whole activations without their B, and what each of the Bs has kept.
        weights = _weights_to_free(m - backwards + kept * backwards - limit, kept, backwards)
        if weights <= backwards:
            spent = backwards * costs.backward_input[d] + weights * costs.backward_weight[d]
            earliest = min(
                earliest, (m - 1) * costs.forward[d] + spent + (wait if backwards else 0.0)
            )
    return earliest


def _weights_to_free(over: float, kept: float, most: int) -> int:
    """Return how many Ws free `over` activations, `kept` each; more than `most` if that many are
    not enough."""
    over -= _ROUNDING
    if over <= 0:
        return 0
    return math.ceil(over / kept) if over <= kept * most else most + 1
