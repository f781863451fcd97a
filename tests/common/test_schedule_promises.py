"""What the papers promise of the schedules with chunks: bubble times and peaks, at many sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schedule.action import ScheduleError
from common.schedule.controllable import why_not_v_min
from common.schedule.generators import make_schedule
from common.schedule.interleaved import interleaved
from common.schedule.simulate import Costs, Simulation, simulate
from common.schedule.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "zero_bubble_tables.json").read_text())["rows"]
times = st.floats(0.1, 10)
devices, rounds, chunks = st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)


def simulated(name: str, p: int, m: int, v: int = 2, costs: Costs | None = None) -> Simulation:
    return simulate(make_schedule(name, p, m, v), costs)


@settings(max_examples=80, deadline=None)
@given(devices, rounds, chunks, times, times, times)
def test_interleaved_zb(p: int, r: int, v: int, f: float, b: float, w: float) -> None:
    """W fills the gaps as long as it takes no longer than they are."""
    w = min(w, f, b)
    simulation = simulated("interleaved-zb", p, r * p, v, Costs.uniform(p, f, b, w))
    bubble = (p - 1) * (f + b - w) / v
    assert simulation.makespan == pytest.approx(r * p * (f + b + w) + bubble)
    assert max(simulation.peak_in_flight_per_stage) == p


def test_interleaved_zb_at_published_costs() -> None:
    """Four chunks against ZB-H1, as docs/schedules.md says."""
    (row,) = (r for r in PUBLISHED if (r["model"], r["micro_batches"]) == ("1.5B", 24))
    costs = Costs.uniform(8, **row["milliseconds"])
    bubbles = [simulated("interleaved-zb", 8, 24, v, costs).bubble_fraction for v in (1, 4)]
    assert bubbles == pytest.approx([row["bubble_fraction"]["zb-h1"], 0.0668], abs=0.00005)


@settings(max_examples=80, deadline=None)
@given(devices, rounds, chunks, times, times, st.floats(0, 1))
def test_interleaved_overlap(
    p: int, r: int, v: int, f: float, backward: float, share: float
) -> None:
    longer = max(f, backward)
    pair = longer + share * (f + backward - longer)
    times_of_all = [(t,) * p for t in (f, backward / 2, backward / 2, 0.0)]
    costs = Costs(*times_of_all, overlap=(pair,) * p)
    simulation = simulated("interleaved-overlap", p, r * p, v, costs)
    alone, pairs = p - 1 + p * (v - 1) + 1, r * p * v - p * (v - 1) - 1
    assert simulation.makespan == pytest.approx((alone * (f + backward) + pairs * pair) / v)


@settings(max_examples=80, deadline=None)
@given(devices, st.integers(1, 20), chunks, times, times, times)
def test_a_short_warm_up_costs_nothing_where_messages_are_free(
    p: int, m: int, v: int, f: float, b: float, w: float
) -> None:
    costs = Costs.uniform(p, f, b, w)
    full, short = (simulate(interleaved(p, m, v, short=each), costs) for each in (False, True))
    assert short.makespan == pytest.approx(full.makespan)
    assert max(short.peak_in_flight_per_stage) <= max(full.peak_in_flight_per_stage)


def test_a_short_warm_up_by_hand() -> None:
    # Paddle's balanced schedule: 11 chunks instead of 14.
    full, short = (interleaved(4, 7, 2, short=each) for each in (False, True))
    assert max(simulate(full).peak_in_flight_per_stage) == 7
    assert max(simulate(short).peak_in_flight_per_stage) == 5.5
    slow = Costs.uniform(4, communication=0.05)
    assert simulate(full, slow).makespan < simulate(short, slow).makespan


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 12])
def test_groups_of_any_size_that_runs(size: int) -> None:
    for p in (1, 2, 3):
        try:
            schedule = interleaved(p, 12, 2, size)
        except ScheduleError as error:
            assert f"at least {p}" in str(error)
        else:
            assert validate(schedule) == []
            first = [a.micro_batch for a in schedule.devices[0] if str(a).startswith("F")]
            assert first[: 2 * size] == [*range(size), *range(size)]


def test_v_half_and_v_min_hold_what_they_promise() -> None:
    for p in range(1, 13):
        for m in (1, 2, p, 2 * p + 1, 3 * p):
            for name, limit in (("v-half", (p + 2) // 2), ("v-min", (p + 4) // 3)):
                simulation = simulated(name, p, m)
                assert max(simulation.peak_memory_per_stage) <= limit
                assert max(simulation.peak_in_flight_per_stage) <= limit


@pytest.mark.parametrize(
    ("name", "p", "m", "rate"),
    # Bubble rates that the authors' program prints.
    [
        ("v-half", 2, 8, 0.0204),
        ("v-half", 4, 8, 0.0943),
        ("v-half", 4, 12, 0.0649),
        ("v-min", 2, 8, 0.0588),
        ("v-min", 4, 8, 0.1864),
        ("v-min", 4, 12, 0.1325),
    ],
)
def test_the_published_rates(name: str, p: int, m: int, rate: float) -> None:
    assert simulated(name, p, m).bubble_fraction == pytest.approx(rate, abs=0.00005)


def test_v_min_at_unequal_costs() -> None:
    schedule = make_schedule("v-min", 8, 24, 2)
    why = why_not_v_min(schedule, Costs.uniform(8, 1, 1.2, 0.7, 0.05))
    assert why is not None
    assert "107.55 with these" in why and "v-half takes 83.75" in why
    assert why_not_v_min(schedule, Costs.uniform(8, 2, 2, 2)) is None
    # Recomputation makes B longer by F.
    assert why_not_v_min(schedule, replace(Costs.uniform(8, 2, 2, 2), recompute="full")) is not None
    assert why_not_v_min(schedule, replace(Costs.uniform(8, 2, 0, 2), recompute="full")) is None


def test_dualpipev_holds_the_same_on_every_device() -> None:
    for p in range(1, 7):
        for m in range(2 * p, 2 * p + 4):
            peaks = simulated("dualpipev", p, m).peak_in_flight_per_stage
            assert max(peaks) <= p + 0.5
        with pytest.raises(ScheduleError, match=f"expected at least {2 * p}"):
            make_schedule("dualpipev", p, 2 * p - 1, 2)


def test_sizes_that_do_not_fit() -> None:
    for name in ("v-half", "v-min", "dualpipev"):
        with pytest.raises(ScheduleError, match=f"{name} has 2 chunks per device, not 1"):
            make_schedule(name, 2, 8, 1)
    with pytest.raises(ScheduleError, match="groups of 9 micro-batches; expected 1 to 8"):
        interleaved(2, 8, 2, 9)
    with pytest.raises(ScheduleError, match="of at least 4"):
        interleaved(4, 8, 2, 2)
