"""The search: within the memory limit, no worse than any named schedule or published figure, and
never below the lower bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schedule.action import Op, Schedule, ScheduleError
from common.schedule.bound import lower_bound
from common.schedule.fill import fill
from common.schedule.generators import make_schedule, named_schedules
from common.schedule.greedy import greedy
from common.schedule.search import limits, search, shops
from common.schedule.shop import Objective, Shop
from common.schedule.simulate import Costs, simulate
from common.schedule.validate import validate
from common.schedule.zero_bubble import zb_v

GOLDEN = Path(__file__).parents[1] / "golden"
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
FEW = 100_000
"""Actions to try: a fortieth of the default."""


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())["rows"]
    return found


ROWS = rows("zero_bubble_tables")
IDS = [f"{row['model']}-m{row['micro_batches']}" for row in ROWS]


def is_in_order(schedule: Schedule) -> bool:
    return all(
        [a.micro_batch for a in row if a.op in (op, Op.BW) and a.chunk == chunk]
        == list(range(schedule.num_micro_batches))
        for row in schedule.devices
        for op in (Op.B, Op.W)
        for chunk in range(schedule.num_chunks)
    )


def value(schedule: Schedule, costs: Costs, objective: Objective) -> float:
    simulation = simulate(schedule, costs)
    return simulation.makespan if objective == "plain" else simulation.warm_makespan


def check(
    schedule: Schedule, costs: Costs, limit: list[float], objective: Objective, chunks: list[int]
) -> None:
    """Check what must hold for every result."""
    p, m = schedule.num_devices, schedule.num_micro_batches
    assert validate(schedule) == []
    assert is_in_order(schedule)
    assert schedule.num_chunks in chunks
    peak = simulate(schedule, costs).peak_memory_per_stage
    assert all(held <= most + 1e-6 for held, most in zip(peak, limit, strict=True))
    bound = min(map(lower_bound, shops(p, m, costs, limit, chunks, objective)))
    found = value(schedule, costs, objective)
    assert found >= bound * (1 - 1e-9)
    for v in chunks:
        for named in named_schedules(p, m, v, costs):
            held = simulate(named, costs).peak_memory_per_stage
            if all(a <= b for a, b in zip(held, limit, strict=True)):
                assert found <= value(named, costs, objective) * (1 + 1e-9), named.name


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_twice_the_memory_beats_zb_2p(row: dict[str, Any]) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs, limit = Costs.uniform(p, **row["milliseconds"]), limits(p, m, [2.0])
    # The first needs some steps, and then has the bound.
    enough = 1_000_000 if row is ROWS[0] else FEW
    schedule = search(p, m, costs, limit, [1], "warm", enough)
    check(schedule, costs, limit, "warm", [1])
    simulation = simulate(schedule, costs)
    assert simulation.warm_start_bubble_fraction <= row["bubble_fraction"]["zb-2p"] + 0.5e-4


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_one_chunk_in_1f1bs_memory_is_zb_h1_which_meets_the_bound(row: dict[str, Any]) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs, limit = Costs.uniform(p, **row["milliseconds"]), limits(p, m, [1.0])
    for objective in OBJECTIVES:
        schedule = search(p, m, costs, limit, [1], objective, FEW)
        check(schedule, costs, limit, objective, [1])
        (shop,) = shops(p, m, costs, limit, [1], objective)
        assert value(schedule, costs, objective) == pytest.approx(lower_bound(shop))
        assert value(make_schedule("zb-h1", p, m), costs, objective) == pytest.approx(
            lower_bound(shop)
        )


# The share of 1f1b's memory, and the schedules to beat there.
MEMORY = [(1 / 2, ["v-min"]), (2 / 3, ["v-half"]), (1.0, ["zb-v", "interleaved-zb", "zb-h1"])]


@pytest.mark.parametrize(("share", "names"), MEMORY)
@pytest.mark.parametrize("row", [ROWS[3]], ids=[IDS[3]])
def test_two_chunks_beat_every_named_schedule_in_the_same_memory(
    row: dict[str, Any], share: float, names: list[str]
) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs, limit = Costs.uniform(p, **row["milliseconds"]), limits(p, m, [share])
    schedule = search(p, m, costs, limit, actions_to_try=FEW)
    check(schedule, costs, limit, "plain", [1, 2])
    for name in names:
        named = make_schedule(name, p, m, 1 if name == "zb-h1" else 2)
        assert simulate(schedule, costs).makespan < simulate(named, costs).makespan


# Rates of the authors' own program (sail-sg/zero-bubble-pipeline-parallelism, zbv.py) at the costs
# of the golden tables, where a chunk takes half a stage's time.
@pytest.mark.parametrize("row", rows("zb_v_rates"), ids=lambda row: f"p{row['stages']}")
def test_zb_v_is_no_worse_than_its_authors_in_any_printed_row(row: dict[str, Any]) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs = Costs.uniform(p, **row["milliseconds"])
    schedule = zb_v(p, m, costs)
    simulation = simulate(schedule, costs)
    assert is_in_order(schedule)
    assert max(simulation.peak_memory_per_stage) <= p
    assert simulation.warm_start_bubble_fraction <= row["bubble_fraction"] + 0.5e-4


def test_zb_v_keeps_its_own_order_where_that_is_best() -> None:
    assert zb_v(4, 8, Costs.uniform(4)) == zb_v(4, 8)


# Costs drawn at random, and the best makespan at 1f1b's memory with one chunk per device: CP-SAT
# has proved that none is better (tests/campaigns/prove_search.py).
PROVED = rows("proved_optima")


@pytest.mark.parametrize(
    "row", PROVED, ids=[f"p{r['stages']}-m{r['micro_batches']}-{r['objective']}" for r in PROVED]
)
def test_small_ones_are_solved_to_the_proved_optimum(row: dict[str, Any]) -> None:
    p, m, objective = row["stages"], row["micro_batches"], row["objective"]
    costs = Costs(**{name: tuple(each) for name, each in row["costs"].items()})
    limit = limits(p, m, [1.0])
    schedule = search(p, m, costs, limit, [1], objective, actions_to_try=3 * FEW)
    check(schedule, costs, limit, objective, [1])
    assert value(schedule, costs, objective) == pytest.approx(row["optimum"])


def test_the_worked_example() -> None:
    """The numbers at the top of common/schedule/search.py and common/schedule/bound.py."""
    costs = Costs.uniform(2)
    found = search(2, 3, costs, [2, 2], [1])
    assert str(found).splitlines()[1:] == [
        "0: F0 F1 B0 W0 F2 B1 W1 B2 W2",
        "1: F0 B0 F1 B1 W0 F2 B2 W1 W2",
    ]
    for limit, plain, warm in ((2, 10, 10), (3, 10, 9)):
        for objective, best in zip(OBJECTIVES, (plain, warm), strict=True):
            found = search(2, 3, costs, [limit] * 2, [1], objective)
            (shop,) = shops(2, 3, costs, [limit] * 2, [1], objective)
            assert value(found, costs, objective) == lower_bound(shop) == best


times = st.floats(0, 3)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1))
def test_any_costs_and_limits(data: st.DataObject, p: int, m: int, kept: float) -> None:
    """Also with costs of 0, and costs of every virtual stage."""
    v, own = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    count = p * v if own else p
    each = [tuple(data.draw(st.lists(times, min_size=count, max_size=count))) for _ in range(4)]
    costs = Costs(*each, kept_by_backward_input=kept)
    limit = data.draw(st.lists(st.floats(1, 2 * p + 1), min_size=p, max_size=p))
    objective = data.draw(st.sampled_from(OBJECTIVES))
    chunks = [v] if own else [1, v]
    check(search(p, m, costs, limit, chunks, objective, 2_000), costs, limit, objective, chunks)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 10), st.integers(1, 3), st.floats(0, 1))
def test_every_order_fits_and_none_beats_the_lower_bound(
    data: st.DataObject, p: int, m: int, v: int, kept: float
) -> None:
    each = [tuple(data.draw(st.lists(times, min_size=p, max_size=p))) for _ in range(4)]
    costs = Costs(*each, kept_by_backward_input=kept)
    limit = data.draw(st.lists(st.floats(1, 2 * p + 1), min_size=p, max_size=p))
    objective = data.draw(st.sampled_from(OBJECTIVES))
    handicaps = data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1)))
    for shop in shops(p, m, costs, limit, [v], objective):
        built = greedy(shop, handicaps, data.draw(st.integers(1, 3)))
        assert built is not None and shop.fits(built)
        filled = fill(shop, built, 2)
        assert filled is not None and shop.fits(filled)
        for order in (built, filled):
            schedule = shop.schedule(order)
            assert validate(schedule) == [] and is_in_order(schedule)
            timed = shop.value(order, shop.play(order))
            assert timed == pytest.approx(value(schedule, costs, objective))
            assert timed >= lower_bound(shop) * (1 - 1e-9)
    for named in named_schedules(p, m, v, costs):
        peak = [max(held, 1e-9) for held in simulate(named, costs).peak_memory_per_stage]
        shop = Shop(p, m, v, named.placement, costs, peak, objective)
        assert value(named, costs, objective) >= lower_bound(shop) * (1 - 1e-9), named.name


def test_the_same_search_gives_the_same_schedule() -> None:
    costs = Costs.uniform(4, 1.0, 1.1, 0.6, 0.05)
    one, two = (search(4, 10, costs, [3.0] * 4, actions_to_try=50_000) for _ in range(2))
    assert one == two


def test_more_memory_is_no_worse() -> None:
    costs = Costs.uniform(4, 1.0, 0.95, 0.5, 0.03)
    spans = [
        simulate(
            search(4, 8, costs, limits(4, 8, [share]), [1], actions_to_try=FEW), costs
        ).makespan
        for share in (0.5, 1.0, 1.5, 2.0)
    ]
    assert spans == sorted(spans, reverse=True)


def test_limits() -> None:
    assert limits(4, 8, [2.0]) == [8.0] * 4
    assert limits(4, 2, [1.0]) == [2.0] * 4
    assert limits(2, 8, [1.0, 2.0]) == [2.0, 4.0]
    with pytest.raises(ScheduleError, match="1 or 4"):
        limits(4, 8, [1.0, 2.0])
    with pytest.raises(ScheduleError, match="1 or more"):
        search(2, 4, Costs.uniform(2), [0.5, 2.0])
    with pytest.raises(ScheduleError, match="1 or more"):
        search(2, 4, Costs.uniform(2), [float("nan"), 2.0])
    with pytest.raises(ScheduleError, match="costs of 3 stages for 2 stages"):
        search(2, 4, Costs.uniform(3), [2.0, 2.0])
    assert search(2, 4, Costs.uniform(2), [float("inf")] * 2, [1]).num_actions == 24
