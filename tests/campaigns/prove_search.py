"""How far the search is from the optimum, by CP-SAT. Needs `pip install triptych[prove]`.

    python -m tests.campaigns.prove_search       20 minutes; a table of docs/schedules.md

Costs are drawn at random, every stage its own. CP-SAT, the constraint solver of Google's OR-Tools,
gets the same problem in its own words: an interval for every action, no two at once on a device,
and the activations as a resource with a limit. It knows no schedule to start from. It says what it
has found in the time given, and below what no schedule can get; where the two are equal the optimum
is proved. Some of these are in tests/golden/proved_optima.json.
"""

from __future__ import annotations

import random
import time

from ortools.sat.python import cp_model

from common.schedule.search import limits, search, shops
from common.schedule.shop import Objective, Shop
from common.schedule.simulate import Costs, simulate
from tests.campaigns.make_schedules import fill_table

UNITS = 100  # CP-SAT counts in whole numbers: costs have two decimals
SECONDS, WORKERS = 60, 2
Case = tuple[int, int, float, int, tuple[float, float]]
# (stages, micro-batches, share of 1f1b's memory, chunks per device, spread of the costs)
CASES: list[Case] = [
    (4, 8, 1.0, 1, (0.5, 1.5)),
    (4, 12, 1.0, 1, (0.5, 1.5)),
    (4, 12, 1.0, 1, (0.2, 2.0)),
    (4, 12, 1.5, 1, (0.5, 1.5)),
    (8, 8, 1.0, 1, (0.5, 1.5)),
    (8, 8, 1.0, 1, (0.2, 2.0)),
    (8, 12, 1.0, 1, (0.5, 1.5)),
    (8, 12, 1.0, 1, (0.2, 2.0)),
    (8, 12, 0.5, 1, (0.5, 1.5)),
    (4, 8, 1.0, 2, (0.5, 1.5)),
    (4, 8, 0.5, 2, (0.5, 1.5)),
]


def draw_costs(p: int, spread: tuple[float, float], seed: int) -> Costs:
    """Return costs for p stages, every one drawn from `spread`, and hops of a tenth of the mean."""
    chance = random.Random(seed)
    forward, backward, weight = (
        tuple(round(chance.uniform(*spread), 2) for _ in range(p)) for _ in range(3)
    )
    return Costs(forward, backward, weight, (round(sum(spread) / 20, 2),) * p)


def prove(shop: Shop, seconds: float = SECONDS) -> tuple[float, float]:
    """Return the best value that CP-SAT finds, and its bound, in the unit of the costs."""
    units = UNITS * shop.v
    model = cp_model.CpModel()
    times = [round(each * units) for each in shop.duration]
    delays = [round(each * units) for each in shop.delay]
    latest = sum(times) + sum(delays)
    start = [model.new_int_var(0, latest, "") for _ in times]
    span = [model.new_fixed_size_interval_var(s, t, "") for s, t in zip(start, times, strict=True)]
    value = model.new_int_var(-latest, latest, "")
    for a, sender in enumerate(shop.before):
        if sender >= 0:
            model.add(start[a] >= start[sender] + times[sender] + delays[a])
        if a % shop.m:  # the micro-batches in order
            model.add(start[a] >= start[a - 1] + times[a - 1])
        model.add(value >= start[a] + times[a] + round(shop.after_last[shop.device[a]] * units))
    share = 1000  # of an activation, in which memory is counted
    for d in range(shop.p):
        here = [a for a, device in enumerate(shop.device) if device == d]
        model.add_no_overlap([span[a] for a in here])
        held, sizes = [], []
        for b in (a for a in here if shop.weight[a] >= 0):  # F to B, and F to W, of one micro-batch
            f, w = b - shop.stages * shop.m, shop.weight[b]
            for last, size in ((b, -shop.holds[b]), (w, -shop.holds[w])):
                end = start[last] + times[last]
                held.append(
                    model.new_interval_var(start[f], model.new_int_var(0, latest, ""), end, "")
                )
                sizes.append(round(size * share))
        model.add_cumulative(held, sizes, int(shop.memory_limit[d] * share))
    model.minimize(value)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = WORKERS
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    best = solver.objective_value / units if found else float("inf")
    return best, solver.best_objective_bound / units


def compare(case: Case, seed: int) -> list[str]:
    """Return one row of the table."""
    p, m, share, chunks, spread = case
    costs, limit = draw_costs(p, spread, seed), limits(p, m, [share])
    objectives: tuple[Objective, ...] = ("plain", "warm")
    objective = objectives[seed % 2]
    began = time.perf_counter()
    simulation = simulate(search(p, m, costs, limit, [chunks], objective), costs)
    seconds = time.perf_counter() - began
    found = simulation.makespan if objective == "plain" else simulation.warm_makespan
    answers = [prove(shop) for shop in shops(p, m, costs, limit, [chunks], objective)]
    best, bound = (min(each) for each in zip(*answers, strict=True))
    drawn = f"{spread[0]:g} to {spread[1]:g}, seed {seed}"
    size = [str(p), str(m), str(share), str(chunks), drawn, objective]
    return [*size, f"{found:.2f}", f"{best:.2f}", f"{bound:.2f}", f"{seconds:.1f}"]


def main() -> None:
    rows = []
    for number, case in enumerate(CASES):
        for seed in (2 * number, 2 * number + 1):
            rows.append(compare(case, seed))
            print(*rows[-1], flush=True)
    size = ("p", "m", "memory", "chunks", "costs", "objective")
    fill_table("proved", (*size, "search", "CP-SAT", "its bound", "seconds"), rows)


if __name__ == "__main__":
    main()
