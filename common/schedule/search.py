"""Search for a schedule with little bubble, for given costs and a memory limit per stage.

    named schedules ─┐
                     ├─► [2] fill ─► [3] tabu search, the better half again and again ─► the best
    [1] greedy ──────┘

[1] Every named schedule that fits in memory is a start, and so the result is never worse than one.
    Others come from `common.schedule.greedy`. For v chunks per device there are starts with both
    placements, in a loop and in a V (`common.schedule.action`).
[2] `common.schedule.fill` keeps the order of F and B and finds better places for W.
[3] `common.schedule.tabu` swaps neighbours on the critical path. All of the best starts get a few
    steps, the better half of them more, and so on until one is left.

It ends early if it reaches `lower_bound`, which no order can beat (`common.schedule.bound`). The
work is counted in actions, never by the clock, so every machine finds the same schedule.

Memory is counted in activations of one micro-batch: F adds 1, B frees all of it but
`Costs.kept_by_backward_input`, W frees the rest; a chunk counts 1/v.

Example: 2 stages, 3 micro-batches, F = B = W = 1, messages take no time, one chunk per stage, and
at most 2 activations, of which B keeps half for W. `lower_bound` is 10, and ZB-H1 reaches it:

    time      0   1   2   3   4   5   6   7   8   9   10
    device 0  F0  F1  ·   B0  W0  F2  B1  W1  B2  W2
    device 1  ·   F0  B0  F1  B1  W0  F2  B2  W1  W2

With room for 3 activations F2 fills the gap on device 0. That does not help: now device 1 ends at
10, after the first F there and 3 (F + B + W). With a warm start (`--objective warm`), which counts
from each stage's own first F, both take 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from common.schedule.action import Placement, Schedule, ScheduleError
from common.schedule.bound import lower_bound
from common.schedule.fill import TARGETS, fill
from common.schedule.generators import named_schedules
from common.schedule.greedy import greedy
from common.schedule.shop import ROUNDING, Objective, Rows, Shop
from common.schedule.simulate import Costs, simulate
from common.schedule.tabu import Tabu

ACTIONS_TO_TRY = 4_000_000
"""How many actions the tabu search times in all: some seconds."""
CHUNKS = (1, 2)
WIDTH = 8  # starts of the tabu search
# Handicaps of F and W, and micro-batches in flight (`greedy`). B comes back to device d after p - d
# Fs and as many Bs, so with F = B there is use for 2 (p - d) Fs.
GREEDY = [(each, most) for most in (2, 3) for each in ((0, 0), (0.1, 0.25), (0.25, 0.5), (0, 0.75))]


def search(
    p: int,
    m: int,
    costs: Costs,
    memory_limit: Sequence[float],
    chunks: Sequence[int] = CHUNKS,
    objective: Objective = "plain",
    actions_to_try: int = ACTIONS_TO_TRY,
    seed: int = 0,
) -> Schedule:
    """Return the best schedule found for p stages and m micro-batches.

    `memory_limit` is in activations of one micro-batch, one number per stage; `chunks` are the
    numbers of chunks per device to try. The objective is the makespan, plain or with a warm start.
    Every operation on every chunk keeps the order of the micro-batches. Raises ScheduleError if the
    numbers are not of p stages, or if not even one activation fits.
    """
    # Up to three: one chunk in a loop, two in a loop, two in a V.
    pipelines = shops(p, m, costs, memory_limit, chunks, objective)
    bounds = {shop: lower_bound(shop) for shop in pipelines}
    named = [
        schedule
        for v in sorted({shop.v for shop in pipelines})
        for schedule in named_schedules(p, m, v, costs)
    ]
    fitting = [schedule for schedule in named if _fits(schedule, costs, memory_limit)]
    starts = [(shop, rows) for shop in pipelines for rows in _starts(shop, named, actions_to_try)]
    # The best first, whichever shape they are of: only `WIDTH` of them are searched.
    starts.sort(key=lambda start: start[0].value(start[1], start[0].play(start[1])))
    searches = [Tabu(shop, rows, seed) for shop, rows in starts[:WIDTH]]
    # Successive halving: 8 starts, then 4, 2, 1. Each round gets a quarter of the work, so
    # the last one alone gets as much as all 8 did in the first round.
    width = WIDTH
    while width:
        del searches[width:]
        for each in searches:
            # Once one has the lowest bound of all shapes, nothing can be better.
            if min(other.value for other in searches) > min(bounds.values()) + ROUNDING:
                share = actions_to_try // (WIDTH.bit_length() * len(searches))
                each.run(max(1, share // each.shop.num_actions), bounds[each.shop])
        searches.sort(key=lambda each: each.value)
        width //= 2
    found = searches[0].shop.schedule(searches[0].rows)

    def values(schedule: Schedule) -> tuple[float, float, float]:
        """Of equal ones the better by the other objective, then the one that holds less."""
        simulation = simulate(schedule, costs, check=False)
        plain, warm = simulation.makespan, simulation.warm_makespan
        first, second = (plain, warm) if objective == "plain" else (warm, plain)
        return first, second, max(simulation.peak_memory_per_stage)

    return replace(min([found, *fitting], key=values), name="search")


def shops(
    p: int,
    m: int,
    costs: Costs,
    memory_limit: Sequence[float],
    chunks: Sequence[int] = CHUNKS,
    objective: Objective = "plain",
) -> list[Shop]:
    """Return all shapes to search, each with its costs and limits. Raises as `search` does."""
    if len(memory_limit) != p:
        raise ScheduleError(f"{len(memory_limit)} memory limits for {p} stages")
    if not all(limit >= 1 for limit in memory_limit):
        raise ScheduleError(
            f"memory limit {min(memory_limit):g} activations; expected 1 or more on every stage"
        )
    # Costs of virtual stages say how many chunks there are.
    # 8 costs for 4 stages are those of 2 chunks; 4 costs fit any number of chunks.
    sizes = [v for v in chunks if costs.num_stages in (p, p * v)]
    if not sizes:
        raise ScheduleError(
            f"costs of {costs.num_stages} stages for {p} stages of {', '.join(map(str, chunks))} "
            "chunks"
        )
    placements: tuple[Placement, ...] = ("loop", "vee")
    return [
        Shop(p, m, v, placement, costs, memory_limit, objective)
        for v in sizes
        for placement in placements[:v]  # one chunk is placed in a loop
    ]


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


def _starts(shop: Shop, named: Sequence[Schedule], actions_to_try: int) -> Iterator[Rows]:
    """Yield orders that fit: [1], each also as [2] has it. Few for a size that takes long."""
    # How often the budget could play a whole order. Of 100,000 actions that is 40 times; then there
    # are 2 greedy starts, and `fill` tries the two extreme targets alone.
    layouts = actions_to_try // shop.num_actions
    orders: list[Rows | None] = [
        shop.rows(schedule)
        for schedule in named
        if (schedule.num_chunks, schedule.parts) == (shop.v, shop.shape.parts)
    ]
    orders += [greedy(shop, *knobs) for knobs in GREEDY[: max(1, layouts // 20)]]
    for rows in orders:
        if rows is None:
            continue
        if shop.fits(rows):
            yield rows
        if (filled := fill(shop, rows, min(TARGETS, layouts // 50))) is not None:
            yield filled


def _fits(schedule: Schedule, costs: Costs, memory_limit: Sequence[float]) -> bool:
    peak = simulate(schedule, costs, check=False).peak_memory_per_stage
    return all(held <= limit + ROUNDING for held, limit in zip(peak, memory_limit, strict=True))
