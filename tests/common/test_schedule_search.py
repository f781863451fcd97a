"""The search: within the memory limit, no worse than the published searches, never below the lower
bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schedule.action import Op, Schedule, ScheduleError
from common.schedule.generators import make_schedule
from common.schedule.search import limits, lower_bound, search
from common.schedule.simulate import Costs, simulate
from common.schedule.validate import validate

ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "zero_bubble_tables.json").read_text()
)["rows"]
IDS = [f"{row['model']}-m{row['micro_batches']}" for row in ROWS]
FEW = 600_000
"""Actions to try: enough for the grid and some changes, a tenth of the default."""


def is_in_order(schedule: Schedule) -> bool:
    return all(
        [a.micro_batch for a in row if a.op is op] == list(range(schedule.num_micro_batches))
        for row in schedule.devices
        for op in (Op.F, Op.B, Op.W)
    )


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_twice_the_memory_beats_zb_2p(row: dict[str, Any]) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs, limit = Costs.uniform(p, **row["milliseconds"]), limits(p, m, [2.0])
    # One row needs more of the default's trials than the others.
    schedule = search(p, m, costs, limit, actions_to_try=1_800_000 if row is ROWS[1] else FEW)
    simulation = simulate(schedule, costs)
    assert validate(schedule) == []
    assert is_in_order(schedule)
    assert max(simulation.peak_memory_per_stage) <= 2 * p + 1e-9
    assert simulation.warm_start_bubble_fraction <= row["bubble_fraction"]["zb-2p"] + 0.5e-4
    assert simulation.warm_makespan >= lower_bound(m, costs, limit) * (1 - 1e-12)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_1f1b_memory_is_no_worse_than_zb_h1_which_meets_the_bound(row: dict[str, Any]) -> None:
    p, m = row["stages"], row["micro_batches"]
    costs, limit = Costs.uniform(p, **row["milliseconds"]), limits(p, m, [1.0])
    schedule = search(p, m, costs, limit, actions_to_try=FEW)
    simulation, h1 = simulate(schedule, costs), simulate(make_schedule("zb-h1", p, m), costs)
    assert validate(schedule) == []
    assert max(simulation.peak_memory_per_stage) <= p + 1e-9
    assert simulation.warm_makespan <= h1.warm_makespan
    assert simulation.makespan <= h1.makespan
    assert simulation.warm_makespan == pytest.approx(lower_bound(m, costs, limit))


def test_the_worked_example() -> None:
    """The numbers at the top of common/schedule/search.py."""
    costs = Costs.uniform(2)
    two, three = (
        (search(2, 3, costs, [limit] * 2), lower_bound(3, costs, [limit] * 2)) for limit in (2, 3)
    )
    assert str(two[0]).splitlines()[1:] == [
        "0: F0 F1 B0 W0 F2 B1 W1 B2 W2",
        "1: F0 B0 F1 B1 W0 F2 B2 W1 W2",
    ]
    assert simulate(two[0], costs).start.tolist() == [
        0,
        1,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    assert simulate(two[0], costs).warm_makespan == two[1] == 10
    assert simulate(three[0], costs).warm_makespan == three[1] == 9


times = st.floats(0.2, 3)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.floats(0, 1))
def test_any_costs_and_limits(data: st.DataObject, p: int, m: int, kept: float) -> None:
    each = [tuple(data.draw(st.lists(times, min_size=p, max_size=p))) for _ in range(4)]
    costs = Costs(*each, kept_by_backward_input=kept)
    limit = data.draw(st.lists(st.floats(1, 2 * p + 1), min_size=p, max_size=p))
    schedule = search(p, m, costs, limit, actions_to_try=2_000)
    simulation = simulate(schedule, costs)
    assert validate(schedule) == []
    assert is_in_order(schedule)
    for held, allowed in zip(simulation.peak_memory_per_stage, limit, strict=True):
        assert held <= allowed + 1e-6
    assert simulation.warm_makespan >= lower_bound(m, costs, limit) * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_no_schedule_beats_the_lower_bound(
    data: st.DataObject, p: int, m: int, kept: float
) -> None:
    each = [tuple(data.draw(st.lists(times, min_size=p, max_size=p))) for _ in range(4)]
    costs = Costs(*each, kept_by_backward_input=kept)
    for name in ("gpipe", "1f1b", "zb-h1", "zb-h2"):
        simulation = simulate(make_schedule(name, p, m), costs)
        assert simulation.warm_makespan >= lower_bound(
            m, costs, simulation.peak_memory_per_stage
        ) * (1 - 1e-9), name


def test_the_same_search_gives_the_same_schedule() -> None:
    costs = Costs.uniform(4, 1.0, 1.1, 0.6, 0.05)
    one, two = (search(4, 10, costs, [6.0] * 4, actions_to_try=20_000) for _ in range(2))
    assert one == two


def test_more_memory_is_no_worse() -> None:
    costs = Costs.uniform(4, 1.0, 0.95, 0.5, 0.03)
    spans = [
        simulate(search(4, 12, costs, limits(4, 12, [share]), 200_000), costs).warm_makespan
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
    assert search(2, 4, Costs.uniform(2), [float("inf")] * 2).num_actions == 24
