"""The simulator against the published tables, closed forms, and a second simulator written the slow
way.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.runtime.held import HeldActivations
from common.schedule.action import Action, Op, Schedule, ScheduleError
from common.schedule.dependencies import Step, dependencies
from common.schedule.generators import GENERATORS, SEARCH, default_chunks, make_schedule
from common.schedule.recompute import recomputes
from common.schedule.simulate import (
    Costs,
    Simulation,
    peak_held_bytes,
    per_stage,
    simulate,
)
from common.schedule.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED: list[dict[str, Any]] = [
    row
    for name in ("zero_bubble_tables.json", "zero_bubble_more_rows.json")
    for row in json.loads((GOLDEN / name).read_text())["rows"]
]
FIXED = [name for name in GENERATORS if name != SEARCH]
HALF_OF_THE_LAST_DIGIT = 0.5e-4 + 1e-9

sizes = st.integers(1, 8)
times = st.floats(0.1, 10)


def costs_of(row: dict[str, Any]) -> Costs:
    return Costs.uniform(row["stages"], **row["milliseconds"])


@pytest.mark.parametrize(
    "row", PUBLISHED, ids=lambda row: f"p{row['stages']}-m{row['micro_batches']}"
)
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-h2"])
def test_published_bubbles_to_four_decimals(row: dict[str, Any], name: str) -> None:
    if name not in row["bubble_fraction"]:
        pytest.skip("not published for this row")
    v = row["layers"] // row["stages"] if name == "interleaved" else 1
    schedule = make_schedule(name, row["stages"], row["micro_batches"], v)
    simulation = simulate(schedule, costs_of(row), wrap_around="first")
    got = simulation.warm_start_bubble_fraction if name == "zb-h2" else simulation.bubble_fraction
    assert abs(got - row["bubble_fraction"][name]) <= HALF_OF_THE_LAST_DIGIT


@pytest.mark.parametrize(
    "row", PUBLISHED[:6], ids=lambda row: f"p{row['stages']}-m{row['micro_batches']}"
)
def test_the_published_interleaved_rule_breaks_dependencies(row: dict[str, Any]) -> None:
    """Why the rule is not the default of `simulate`: it starts backwards before their message is
    there.
    """
    p, m, v = row["stages"], row["micro_batches"], row["layers"] // row["stages"]
    schedule, costs = make_schedule("interleaved", p, m, v), costs_of(row)
    every, first = simulate(schedule, costs), simulate(schedule, costs, wrap_around="first")
    assert not broken_dependencies(every)
    assert broken_dependencies(first)
    assert every.makespan - first.makespan == pytest.approx(
        p * row["milliseconds"]["communication"]
    )


def broken_dependencies(simulation: Simulation) -> list[Step]:
    """Steps that start before something that they need has ended and arrived."""
    schedule, table = simulation.schedule, simulation.table
    end: dict[Step, tuple[float, int]] = {}
    ends = simulation.end.copy()
    ends[table.leads] = ends[table.leads + 1]  # two that overlap end together
    for row in range(table.num_rows):
        action, device = table.action(row), int(table.device[row])
        k = schedule.virtual_stage(device, action.chunk)
        for op in (action.op, Op.B) if action.op is Op.BW else (action.op,):
            end[Step(op, action.micro_batch, k)] = (float(ends[row]), device)
    broken = []
    for row in range(table.num_rows):
        action, device = table.action(row), int(table.device[row])
        step = Step(action.op, action.micro_batch, schedule.virtual_stage(device, action.chunk))
        for needed in dependencies(step, schedule.num_virtual_stages):
            ended, other = end[needed]
            arrives = ended + (simulation.costs.communication[other] if other != device else 0)
            if simulation.start[row] < arrives - 1e-9:
                broken.append(step)
    return broken


def slow_starts(schedule: Schedule, costs: Costs) -> list[float]:
    """The same times, found by repeating the definition until nothing changes."""
    v, total = schedule.num_chunks, schedule.num_virtual_stages
    start = {(d, n): 0.0 for d, row in enumerate(schedule.devices) for n in range(len(row))}
    place: dict[Step, tuple[int, int]] = {}
    for d, row in enumerate(schedule.devices):
        for n, action in enumerate(row):
            for op in (Op.B, Op.BW) if action.op is Op.BW else (action.op,):
                place[Step(op, action.micro_batch, schedule.virtual_stage(d, action.chunk))] = (
                    d,
                    n,
                )

    def end(d: int, n: int) -> float:
        row = schedule.devices[d]
        if n + 1 < len(row) and row[n + 1].overlaps:
            return end(d, n + 1)
        first = n - 1 if row[n].overlaps else n
        return start[d, n] + sum(costs.of(a.op)[d] for a in row[first : n + 1]) / v

    changed = True
    while changed:
        changed = False
        for (d, n), before in start.items():
            row = schedule.devices[d]
            # Two that overlap start together, when all that either needs is there.
            first = n - 1 if row[n].overlaps else n
            together = range(first, n + 2 if n + 1 < len(row) and row[n + 1].overlaps else n + 1)
            earliest = end(d, first - 1) if first else 0.0
            for action in (row[each] for each in together):
                step = Step(action.op, action.micro_batch, schedule.virtual_stage(d, action.chunk))
                for needed in dependencies(step, total):
                    other = place[needed]
                    arrives = end(*other) + (costs.communication[other[0]] if other[0] != d else 0)
                    earliest = max(earliest, arrives)
            if earliest > before:
                start[d, n] = earliest
                changed = True
    return list(start.values())


@st.composite
def priced(draw: st.DrawFn, names: list[str] = FIXED) -> tuple[Schedule, Costs]:
    name = draw(st.sampled_from(names))
    p, m = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    v = GENERATORS[name].chunks or draw(st.integers(1, 3))
    m = max(m, 2 * p) if name == "dualpipev" else m
    lists = [tuple(draw(st.lists(times, min_size=p, max_size=p))) for _ in range(4)]
    return make_schedule(name, p, m, v), Costs(*lists)


@settings(max_examples=60, deadline=None)
@given(priced())
def test_agrees_with_the_slow_simulator(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    simulation = simulate(schedule, costs)
    assert simulation.start.tolist() == pytest.approx(slow_starts(schedule, costs), rel=1e-12)
    assert not broken_dependencies(simulation)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 30), times, times, times)
def test_closed_forms_of_equal_stages(p: int, m: int, f: float, b: float, w: float) -> None:
    costs, whole = Costs.uniform(p, f, b, w), f + b + w

    def simulated(name: str, v: int = 1) -> Simulation:
        return simulate(make_schedule(name, p, m, v), costs)

    for name in ("gpipe", "1f1b"):
        simulation = simulated(name)
        assert 1 - simulation.bubble_fraction == pytest.approx(m / (m + p - 1))
        idle = p * simulation.makespan - simulation.busy.sum()
        assert idle == pytest.approx(p * (p - 1) * whole, abs=1e-9 * p * m * whole)
        assert simulation.bubble_fraction_per_stage == pytest.approx(
            [simulation.bubble_fraction] * p
        )
    assert simulated("naive").makespan == pytest.approx(m * p * whole)
    if m >= p:
        for v in (1, 2, 3):
            bubble = simulated("interleaved", v).makespan - m * whole
            assert bubble == pytest.approx((p - 1) * whole / v, abs=1e-9 * m * whole)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 20), st.floats(0.5, 3), st.floats(0, 1), st.floats(0, 1))
def test_closed_forms_of_zero_bubble(
    p: int, more: int, f: float, b_share: float, w_share: float
) -> None:
    """(p-1)(F+B-W) and (p-1)(F+B-2W), for W up to F and B, and B up to F (larger ones make other
    waits the longest).
    """
    b = f * (0.5 + 0.5 * b_share)
    w = b * (0.1 + 0.4 * w_share)
    m = 2 * p + more
    costs, whole = Costs.uniform(p, f, b, w), f + b + w
    h1 = simulate(make_schedule("zb-h1", p, m), costs)
    assert h1.makespan - m * whole == pytest.approx((p - 1) * (f + b - w), abs=1e-9 * m)
    h2 = simulate(make_schedule("zb-h2", p, m), costs)
    assert h2.warm_makespan - m * whole == pytest.approx((p - 1) * (f + b - 2 * w), abs=1e-9 * m)


def largest_stage_time(costs: Costs, m: int) -> float:
    """T = sum t_i + (m-1) max t_i."""
    t = costs.per_micro_batch
    return float(t.sum() + (m - 1) * t.max())


@settings(max_examples=60, deadline=None)
@given(st.lists(times, min_size=1, max_size=8), st.integers(1, 20), st.floats(0.2, 3))
def test_unequal_stages_of_gpipe(stages: list[float], m: int, ratio: float) -> None:
    """T, exactly, when all stages have the same ratio of backward to forward: each half is a flow
    shop.
    """
    costs = Costs(
        tuple(stages), tuple(ratio * t for t in stages), (0.0,) * len(stages), (0.0,) * len(stages)
    )
    makespan = simulate(make_schedule("gpipe", len(stages), m), costs).makespan
    assert makespan == pytest.approx(largest_stage_time(costs, m))


@settings(max_examples=60, deadline=None)
@given(st.lists(times, min_size=1, max_size=8), st.integers(1, 20), st.floats(0.2, 3))
def test_unequal_stages_of_1f1b(stages: list[float], m: int, ratio: float) -> None:
    """At most T, and exactly T when the last stage is the largest."""
    zeros = (0.0,) * len(stages)

    def makespan(order: list[float]) -> tuple[float, float]:
        costs = Costs(tuple(order), tuple(ratio * t for t in order), zeros, zeros)
        return simulate(make_schedule("1f1b", len(order), m), costs).makespan, largest_stage_time(
            costs, m
        )

    found, bound = makespan(stages)
    assert found <= bound * (1 + 1e-9)
    found, bound = makespan(sorted(stages))
    assert found == pytest.approx(bound)


@given(sizes, st.integers(1, 24))
def test_activations_in_flight(p: int, m: int) -> None:
    def peaks(name: str, v: int = 1) -> list[float]:
        return simulate(make_schedule(name, p, m, v)).peak_in_flight_per_stage

    assert peaks("naive") == [1] * p
    assert peaks("gpipe") == [m] * p
    assert peaks("1f1b") == peaks("zb-h1") == [min(p - i, m) for i in range(p)]
    assert peaks("zb-h2") == [min(2 * (p - i) - 1, m) for i in range(p)]
    assert max(peaks("zb-v", 2)) <= p
    if m >= 2 * p:
        assert peaks("zb-v", 2) == [p] * p
    if m % p == 0 and m >= 3 * p:
        chunks = simulate(make_schedule("interleaved", p, m, 2)).peak_chunks_in_flight_per_stage
        assert chunks == [2 * (p - i - 1) + p + 1 for i in range(p)]


@pytest.mark.parametrize("kept", [0.0, 0.37, 1.0])
def test_memory_counts_what_is_kept_for_the_weights(kept: float) -> None:
    schedule = Schedule(
        "x", (tuple(Action(op, i) for op in (Op.F, Op.B, Op.W) for i in range(4)),), 4
    )
    costs = Costs((1,), (1,), (1,), (0,), activation_bytes=(1000,), kept_by_backward_input=kept)
    simulation = simulate(schedule, costs)
    assert simulation.peak_memory_per_stage == [4]
    assert simulation.peak_bytes_per_stage == [4000]
    late = Schedule("y", (tuple(Action(op, i) for i in range(4) for op in (Op.F, Op.B)),), 4)
    late = Schedule("y", ((*late.devices[0], *(Action(Op.W, i) for i in range(4))),), 4)
    assert simulate(late, costs).peak_memory_per_stage == pytest.approx(
        [max(1 + 3 * kept, 4 * kept)]
    )


def test_recomputation_takes_a_forward_more_and_holds_inputs() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    costs = Costs.uniform(4, forward=2, backward_input=3, backward_weight=1)
    plain = simulate(schedule, costs)
    full = simulate(schedule, replace(costs, recompute="full", kept_by_forward=0.1))
    assert plain.makespan == (8 + 3) * 6 and full.makespan == (8 + 3) * 8
    assert full.peak_memory_per_stage == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert full.peak_chunks_in_flight_per_stage == plain.peak_chunks_in_flight_per_stage
    last = simulate(schedule, replace(costs, recompute="except-last", kept_by_forward=0.1))
    assert (full.busy - last.busy).tolist() == [2, 2, 2, 2]  # one micro-batch's forward
    assert last.peak_memory_per_stage == pytest.approx([1.3, 1.2, 1.1, 1])
    split = simulate(
        make_schedule("zb-h1", 4, 8), replace(costs, recompute="every-2", kept_by_forward=0.1)
    )
    assert split.busy.tolist() == [8 * 8] * 4


RECOMPUTE = st.one_of(
    st.sampled_from(["none", "full", "except-last"]), st.integers(1, 3).map(lambda n: f"every-{n}")
)


@given(
    st.sampled_from(sorted(GENERATORS.keys() - {SEARCH})),
    st.integers(1, 4),
    st.integers(1, 3),
    RECOMPUTE,
    st.data(),
)
def test_held_bytes_are_those_that_a_run_counts(
    name: str, p: int, rounds: int, how: str, data: st.DataObject
) -> None:
    """`peak_held_bytes` against `HeldActivations`, fed with every action as a stage feeds it."""
    m, chunks = p * (rounds + 1), default_chunks(name)
    schedule = make_schedule(name, p, m, chunks)
    per_chunk = st.lists(st.integers(0, 10**9), min_size=chunks, max_size=chunks)
    forward, recomputed, waiting = (
        data.draw(st.lists(per_chunk, min_size=p, max_size=p)) for _ in range(3)
    )
    counted = []
    for device, actions in enumerate(schedule.devices):
        held = HeldActivations(chunks, lambda i: recomputes(how, i, m))
        for i in range(m):
            held.bytes_of(i)[:] = recomputed[device] if recomputes(how, i, m) else forward[device]
            held.waiting_bytes_of(i)[:] = waiting[device]
        in_flight: set[tuple[int, int]] = set()
        waits: set[tuple[int, int]] = set()
        for action in actions:
            place = (action.micro_batch, action.chunk)
            match action.op:
                case Op.F:
                    in_flight.add(place)
                case Op.B:
                    in_flight.remove(place)
                    waits.add(place)
                case Op.BW:
                    in_flight.remove(place)
                case Op.W:
                    waits.remove(place)
            held.note(in_flight, waits)
        counted.append(held.peak_bytes)
    assert peak_held_bytes(schedule, forward, recomputed, waiting, how) == counted


@given(st.integers(2, 6), st.integers(1, 12))
def test_zb_v_has_no_bubble_for_equal_costs(p: int, m: int) -> None:
    assume(m >= 2 * p)
    assert simulate(make_schedule("zb-v", p, m, 2)).warm_start_bubble_fraction == pytest.approx(
        0, abs=1e-12
    )


def test_messages_wait_for_a_link_that_is_busy() -> None:
    """Three activations leave until 4, 7 and 10 and arrive at 5, 8 and 11; the gradients, of
    backwards that end at 14, 16 and 18, leave until 17, 20 and 23.
    """
    schedule = make_schedule("gpipe", 2, 3)
    costs = Costs.uniform(2, communication=1)
    assert simulate(schedule, replace(costs, communication=(4.0, 4.0))).makespan == 20
    slow = simulate(schedule, replace(costs, transmission=(3.0, 3.0)))
    assert slow.start.tolist() == [0, 1, 2, 18, 21, 24, 5, 8, 11, 12, 14, 16]
    assert slow.makespan == 26
    assert slow.delay[:3].tolist() == [4, 6, 8]
    # A message to oneself, where a V turns, takes no link.
    turning = simulate(make_schedule("zb-v", 1, 2, 2), replace(Costs.uniform(1), transmission=(9,)))
    assert turning.makespan == 6


def test_costs_that_do_not_fit_are_refused() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    for bad in (
        lambda: simulate(schedule, Costs.uniform(3)),
        lambda: Costs((1,), (1, 1), (1,), (1,)),
        lambda: Costs((-1,), (1,), (1,), (1,)),
        lambda: Costs((float("nan"),), (1,), (1,), (1,)),
        lambda: Costs((1,), (1,), (1,), (1,), kept_by_backward_input=2),
        lambda: Costs((1,), (1,), (1,), (1,), kept_by_forward=-1),
        lambda: Costs((1,), (1,), (1,), (1,), transmission=(-1,)),
        lambda: Costs((1,), (1,), (1,), (1,), transmission=(1, 1)),
        lambda: Costs((1,), (1,), (1,), (1,), recompute="every-0"),
        lambda: per_stage([1, 2], 3, "forward"),
    ):
        with pytest.raises(ScheduleError):
            bad()
    broken = Schedule("x", (schedule.devices[0], tuple(reversed(schedule.devices[1]))), 2)
    with pytest.raises(ScheduleError, match="backward-before-forward"):
        simulate(broken)


def test_a_million_actions() -> None:
    """In some 3 s; what is not linear takes minutes here."""
    schedule = make_schedule("interleaved", 64, 2048, 4)
    assert validate(schedule) == []
    simulation = simulate(schedule, check=False)
    assert schedule.num_actions == 1_048_576
    assert simulation.makespan - 2048 * 3 == pytest.approx(63 * 3 / 4)
    assert np.isfinite(simulation.end).all()
