"""Plans: the memory model's counts, the cut under a limit, the ranking, and the command line."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cli import main as cli
from common.cli.main import main
from common.cli.options import read_run
from common.harness import profile as harness_profile
from common.harness.profile import (
    IN_CHUNKS,
    IN_ONE_PIECE,
    Profile,
    micro_batch_sizes,
    numbers_of_devices,
    profile_config,
    unit_times,
)
from common.report.plan import size, size_enough
from common.report.timing import ActionCost, Timing
from common.runtime import cpus as runtime_cpus
from common.schedule.action import Op, ScheduleError
from common.schedule.generators import GENERATORS, SEARCH, make_schedule
from common.schedule.occupancy import occupancy
from common.schedule.simulate import Costs, peak_held_bytes, simulate
from common.spec.memory import Lines, Memory
from common.spec.memory_limit import balanced_within, least_limit
from common.spec.partition import plan_partition
from common.spec.plan import RECOMPUTE, Plan, candidates, make_plans, plan_one
from common.spec.run import RunConfig, preset
from common.spec.traffic import traffic_bytes
from common.spec.unit_times import UnitTimes, counted_times

SMALL = preset("small")


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != SEARCH])
def test_occupancy_gives_every_peak(name: str) -> None:
    random_sizes = np.random.default_rng(0).integers(1, 1000, (2, 8, 4))
    for p, m, v in itertools.product((1, 2, 4, 8), (1, 4, 9, 24), (1, 2, 3, 4)):
        try:
            schedule = make_schedule(name, p, m, v)
        except ScheduleError:
            continue
        held, waiting = random_sizes[:, :p, :v]
        counts = occupancy(schedule)
        peaks = [
            int((c[:, :, 0, 0] @ held[d] + c[:, :, 0, 1] @ waiting[d]).max())
            for d, c in enumerate(counts)
        ]
        assert peaks == peak_held_bytes(schedule, held, held, waiting), (p, m, v)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != SEARCH])
def test_lines_are_what_a_device_holds(name: str) -> None:
    """For every mode of recomputation, tied heads and uneven micro-batches, whatever the cut."""
    draw, seen = random.Random(name), 0
    for tied, batch, framework in (
        (False, 16, "torch"),
        (True, 13, "tensorflow"),
        (True, 9, "paddle"),
    ):
        model = SMALL.model.model_copy(update={"num_layers": 20, "tied_head": tied})
        train = SMALL.train.model_copy(update={"batch_size": batch})
        base = SMALL.model_copy(update={"model": model, "train": train, "framework": framework})
        runs = list(candidates(base, 4, [name]))
        for run, recompute in itertools.product(draw.sample(runs, 6), RECOMPUTE):
            schedule = make_schedule(name, run.stages, run.train.micro_batches, run.chunks)
            memory = Memory(run.model_copy(update={"recompute": recompute}), schedule)
            last = schedule.num_virtual_stages - 1
            for d, lines in enumerate(memory.all_lines):
                counts = [n + draw.randint(0, 4) for n in lines.least]
                parts = [
                    ("embedding",) * (k == 0) + ("block",) * n + ("head",) * (k == last)
                    for k, n in zip(schedule.parts[d], counts, strict=True)
                ]
                of_lines = int((lines.per_block @ counts + lines.besides).max())
                has_blocks = sum(counts) > 0
                held = memory.of_device(d, parts).total_bytes
                assert held == (of_lines if has_blocks else lines.least_bytes)
                seen += has_blocks
    assert seen > 100


@pytest.mark.parametrize("seed", range(8))
def test_the_cut_under_a_limit_is_the_best_that_fits(seed: int) -> None:
    """Against every cut there is, with memory of any shape that grows with every block."""
    draw = random.Random(seed)
    found = [one_limited_cut(draw) for _ in range(400)]
    assert all(mine == best for mine, best in found)
    assert 50 < sum(best is None for (best, _), _ in found) < 350  # both kinds occurred


Loads = tuple[tuple[int, int] | None, int]


def one_limited_cut(draw: random.Random) -> tuple[Loads, Loads]:
    """((largest device, largest part) under a limit, the smallest limit): ours, and of all cuts."""
    p, v = draw.choice([(1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3), (1, 3), (1, 4)])
    layers = draw.randint(max(1, p * v - 2), p * v + 3)
    ends = embedding, block, head = draw.randint(0, 9), draw.randint(1, 9), draw.randint(0, 30)
    devices = [k % p for k in range(p * v)]
    draw.shuffle(devices)
    own = [tuple(k for k in range(p * v) if devices[k] == d) for d in range(p)]
    limit, lines = draw.randint(8, 40), []
    for ks in own:
        rows = np.array([[draw.randint(0, 5) for _ in range(v)] for _ in range(3)])
        besides = np.array([draw.randint(0, 12) for _ in range(3)])
        least = tuple(int(0 < k < p * v - 1) for k in ks)
        lines.append(Lines(ks, rows, besides, least, int((rows @ least + besides).max())))
    costs = [embedding, *[block] * layers, head]

    def loads(inner: Sequence[int]) -> tuple[tuple[int, int], int]:
        """((largest device, largest part), bytes of the fullest device)."""
        edges = list(itertools.pairwise([0, *inner, layers + 2]))
        sizes = [sum(costs[a:b]) for a, b in edges]
        blocks = [sum(0 < unit <= layers for unit in range(a, b)) for a, b in edges]
        held = [
            (each.per_block @ [blocks[k] for k in each.places] + each.besides) for each in lines
        ]
        return (max(sum(sizes[k] for k in ks) for ks in own), max(sizes)), int(np.max(held))

    every = [loads(inner) for inner in itertools.combinations(range(1, layers + 2), p * v - 1)]
    least = min(held for _, held in every)
    inner, smallest = balanced_within(ends, layers, lines, limit), least_limit(layers, lines, 10**9)
    assert least_limit(layers, lines, least) is None and smallest is not None
    ours = None if inner is None else loads(inner)[0]
    best = min((each for each, held in every if held <= limit), default=None)
    return (ours, loads(smallest)[1]), (best, least)


def test_the_nearest_needs_least() -> None:
    """Of all candidates, modes of recomputation and cuts of two schedules."""
    base = preset("tiny")
    refused = make_plans(base, 2, counted_times(base, 1e12), 1.0, ["1f1b", "interleaved"]).refused
    for each in refused:
        runs = list(candidates(base, 2, [each.config.schedule]))
        needed = []
        for run, recompute in itertools.product(runs, RECOMPUTE):
            units = base.model.num_layers + 2
            for cut in itertools.combinations(range(1, units), run.stages * run.chunks - 1):
                tried = run.model_copy(update={"recompute": recompute, "partition": cut})
                needed.append(max(device.total_bytes for device in Memory.of_run(tried)))
        assert each.count == len(runs) and each.missing_bytes == min(needed) - 1
        held = Memory.of_run(each.config)[each.device].total_bytes
        assert held == min(needed)


def test_a_block_by_hand() -> None:
    """PyTorch, b = 2, S = 128, D = 256, F = 1024, H = 8, V = 256 in float32: as measured."""
    memory = Memory.of_run(SMALL.model_copy(update={"schedule": "1f1b"}))
    assert [each.activations_bytes for each in memory] == [31_481_856, 16_529_412]
    weights = [each.weights_bytes for each in memory]
    assert sum(weights) == 4 * sum(each.parameters for each in memory)
    assert memory[0].moments_bytes == 2 * memory[0].gradients_bytes == 2 * weights[0]


def test_recomputation_holds_less_and_needs_a_piece_at_a_time() -> None:
    def total(recompute: str) -> tuple[int, int]:
        first = Memory.of_run(SMALL.model_copy(update={"recompute": recompute}))[0]
        return first.activations_bytes, first.recompute_bytes

    assert total("full")[0] < total("every-1")[0] < total("none")[0]
    assert 0 == total("none")[1] < total("every-1")[1] < total("full")[1]
    # The last micro-batch of one is not computed again.
    train = SMALL.train.model_copy(update={"micro_batches": 1})
    one = SMALL.model_copy(update={"recompute": "except-last", "train": train})
    assert Memory.of_run(one)[0].recompute_bytes == 0


def test_a_plans_step_is_the_simulators() -> None:
    times = counted_times(SMALL, 1e9)
    for config in (
        SMALL.model_copy(update={"schedule": "zb-h1"}),
        SMALL.model_copy(update={"schedule": "zb-v", "chunks": 2}),
    ):
        plan = plan_one(config, times, float("inf"))
        parts = plan_partition(plan.config).parts
        costs = [
            tuple(
                sum(times.of(unit, op, config.train.micro_batch_size) for unit in part)
                for part in parts
            )
            for op in (Op.F, Op.B, Op.W)
        ]
        schedule = make_schedule(config.schedule, config.stages, 8, config.chunks)
        expected = simulate(schedule, Costs(*costs, (0.0,) * len(parts)))
        assert plan.step_seconds == pytest.approx(expected.makespan)
        assert plan.bubble_fraction == pytest.approx(expected.bubble_fraction)


def test_uneven_micro_batches_cost_what_they_hold() -> None:
    """Five of 16 sequences: one of 4 and four of 3. On one device nothing is idle."""
    train = SMALL.train.model_copy(update={"micro_batches": 5})
    config = SMALL.model_copy(update={"stages": 1, "train": train})
    times = counted_times(SMALL, 1e9)
    whole = plan_one(config, times, float("inf"))
    even = plan_one(config.model_copy(update={"train": SMALL.train}), times, float("inf"))
    assert whole.step_seconds == pytest.approx(even.step_seconds)


def with_fixed_cost(seconds: float) -> UnitTimes:
    """Every action of a unit costs this, besides what its sequences cost."""
    counted = counted_times(SMALL, 1e9)
    return UnitTimes(
        source="made up",
        seconds={
            kind: {op.value: {b: seconds + counted.of(kind, op, b) for b in (1, 16)} for op in Op}
            for kind in counted.seconds
        },
    )


def test_a_fixed_cost_makes_fewer_micro_batches_better() -> None:
    """m* = sqrt(B (p-1) / a): with a fixed cost of a sequences, m falls as a grows."""
    chosen = [
        make_plans(SMALL, 2, with_fixed_cost(cost), schedules=["1f1b"]).found[0].config
        for cost in (0.0, 0.02, 0.5)
    ]
    counts = [config.train.micro_batches for config in chosen]
    assert counts == sorted(counts, reverse=True) and counts[0] == 16 and counts[-1] < 8


def test_every_candidate_is_planned_or_refused() -> None:
    limit = 30e6
    names = [name for name in GENERATORS if name != SEARCH]
    plans = make_plans(SMALL, 3, counted_times(SMALL, 1e12), limit)
    refused = sum(each.count for each in plans.refused)
    assert len(plans.found) + refused == len(list(candidates(SMALL, 3, names)))
    assert plans.found and plans.refused
    assert all(plan.peak_bytes <= limit for plan in plans.found)
    assert all(each.missing_bytes > 0 for each in plans.refused)
    for plan in plans.found[:5]:  # what it says is what the configuration says by itself
        RunConfig.model_validate(plan.config.model_dump())
        assert Memory.of_run(plan.config) == list(plan.memory)


def test_replicas_and_shards_use_all_devices() -> None:
    train = SMALL.train.model_copy(update={"batch_size": 8})
    model = SMALL.model.model_copy(update={"num_heads": 4})
    config = SMALL.model_copy(update={"train": train, "model": model})
    found = list(candidates(config, 8, ["1f1b"], has_replicas=True, has_shards=True))
    meshes = {(c.stages, c.replicas, c.tensor_parallel) for c in found}
    assert {(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (2, 1, 4)} <= meshes
    assert all(p * d * t == 8 for p, d, t in meshes if d * t > 1)
    assert not any(t == 8 for _, _, t in meshes)  # there are 4 heads
    assert all(min(each.micro_batch_sizes) > 0 for each in found)
    alone = candidates(config.model_copy(update={"replicas": 2}), 8, ["1f1b"])
    assert {(c.stages, c.replicas) for c in alone} == {(4, 2)}


@pytest.mark.parametrize("d, t", [(2, 1), (1, 2), (2, 2)])
def test_what_travels_takes_the_time_of_the_link(d: int, t: int) -> None:
    """One stage: a step over a link takes longer by the bytes that `traffic_bytes` counts."""
    axes = {"stages": 1, "schedule": "naive", "replicas": d, "tensor_parallel": t}
    config = SMALL.model_copy(update=axes)
    free = counted_times(SMALL, 1e12)
    link = free.model_copy(update={"link_bytes_per_second": 1e9})
    plans = [plan_one(config, times, float("inf")) for times in (free, link)]
    fast, slow = (plan.step_seconds for plan in plans if isinstance(plan, Plan))
    sent = sum(count for (a, _), count in traffic_bytes(config).items() if a == 0)
    assert slow - fast == pytest.approx(sent / 1e9, rel=1e-6)
    if t == 1:
        return
    whole = plan_one(config.model_copy(update={"tensor_parallel": 1}), free, float("inf"))
    assert isinstance(whole, Plan) and whole.step_seconds / 2 < fast < whole.step_seconds * 0.6


def test_messages_follow_one_another_over_the_link() -> None:
    config = SMALL.model_copy(update={"stages": 2, "schedule": "gpipe"})
    slow = counted_times(SMALL, 1e12).model_copy(update={"link_bytes_per_second": 1e3})
    plan = plan_one(config, slow, float("inf"))
    assert isinstance(plan, Plan)
    # Activations one way, and only then gradients the other.
    assert plan.step_seconds == pytest.approx(sum(traffic_bytes(config).values()) / 1e3, rel=1e-3)


def test_a_profile_is_put_together_from_runs() -> None:
    def timing(seconds: float, split: bool, units: Sequence[int]) -> Timing:
        """Every unit takes `seconds`, and every action a quarter of a second."""
        ops = ("F", "B", "W") if split else ("F", "BW")
        return Timing.model_construct(
            costs=tuple(
                ActionCost(
                    virtual_stage=k,
                    op=op,
                    seconds=0.25 + count * seconds,
                    p10_seconds=0,
                    p90_seconds=0,
                    count=1,
                )
                for k, count in enumerate(units)
                for op in ops
            ),
            hop_seconds=0.25 * (units != (8,)),
            receive_seconds=0.125 * (len(units) > 2),
            measured_step_seconds=3.0,
            measured_pipeline_seconds=2.0,
        )

    def measured(devices: int, chunks: Sequence[int], pieces: Sequence[int]) -> UnitTimes:
        layouts = [(name, chunks) for name in IN_CHUNKS] + [(name, pieces) for name in IN_ONE_PIECE]
        runs = [
            (profile_config(SMALL, devices, name, b), timing(b + 1.0, "zb" in name, units))
            for b in (1, 2, 4)
            for name, units in layouts
        ]
        for (run, _), (_, units) in zip(runs, itertools.cycle(layouts)):
            assert tuple(map(len, plan_partition(run).parts)) == units
        return unit_times(runs, "here")

    times = measured(2, (1, 1, 2, 2, 1, 1), (4, 4))
    alone = measured(1, (1, 1, 5, 1), (8,))
    about = functools.partial(pytest.approx, rel=1e-12)
    assert times.of("block.3", Op.BW, 2) == about(3.0) and times.of("head", Op.W, 3) == about(4.0)
    assert times.of("embedding", Op.F, 8) == about(9.0)  # on along the last line
    for each in (times, alone):
        assert each.of_part(["block.0"] * 12, Op.B, 1) == about(0.25 + 12 * 2.0)
        assert (each.hop_seconds, each.receive_seconds) == (0.25, 0.125)  # of runs that have them
        assert each.optimizer_seconds_per_parameter > 0


def test_no_unit_of_a_profile_takes_less_than_nothing() -> None:
    """An embedding that is done before a block's action has begun; a block still has its time."""
    run = profile_config(SMALL, 2, "interleaved", 1)
    costs = tuple(
        ActionCost(virtual_stage=k, op=op, seconds=s, p10_seconds=0, p90_seconds=0, count=1)
        for op in ("F", "B", "W", "BW")
        for k, s in enumerate((0.01, 1.0, 1.5, 1.5, 1.0, 0.01))
    )
    known = {"hop_seconds": 0.0, "measured_step_seconds": 1.0, "measured_pipeline_seconds": 1.0}
    times = unit_times([(run, Timing.model_construct(costs=costs, **known))], "here")
    assert min(times.of(kind, Op.F, 1) for kind in times.seconds) == 0.0
    assert times.of_part(["block.0"] * 2, Op.F, 1) == pytest.approx(1.5, rel=0.1)


def test_a_message_that_is_there_takes_time_too() -> None:
    """On one stage of two chunks, each micro-batch comes to the second and back to the first."""
    config = SMALL.model_copy(update={"stages": 1, "chunks": 2, "schedule": "interleaved"})
    free = counted_times(SMALL, 1e12)
    slow = free.model_copy(update={"receive_seconds": 0.5})
    plans = [plan_one(config, times, float("inf")) for times in (free, slow)]
    fast, late = (plan.step_seconds for plan in plans if isinstance(plan, Plan))
    assert late - fast == pytest.approx(2 * config.train.micro_batches * 0.5)
    # Whoever waits has it within the hop.
    hop = free.model_copy(update={"hop_seconds": 1.0})
    both = hop.model_copy(update={"receive_seconds": 1.0})
    config = SMALL.model_copy(update={"stages": 2, "schedule": "naive"})
    plans = [plan_one(config, times, float("inf")) for times in (hop, both)]
    fast, late = (plan.step_seconds for plan in plans if isinstance(plan, Plan))
    assert late == pytest.approx(fast)


def test_fewer_devices_have_their_own_times() -> None:
    """On two cores one stage has both of them, and takes half the time."""
    link = {"link_bytes_per_second": 1e9}
    two, one = (counted_times(SMALL, rate).model_copy(update=link) for rate in (1e9, 2e9))
    times = two.model_copy(update={"fewer": {1: one}})
    alone = SMALL.model_copy(update={"stages": 1})
    for config, own in ((SMALL, two), (alone, one)):
        assert plan_one(config, times, float("inf")) == plan_one(config, own, float("inf"))


def test_a_cpu_is_measured_with_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, devices, expected in (
        (2, 2, [2, 1]),
        (8, 4, [4, 2, 1]),
        (2, 4, [4, 3, 2, 1]),
        (8, 9, [9, 8, 4, 2, 1]),
    ):
        for module in (harness_profile, runtime_cpus):
            monkeypatch.setattr(module, "usable_cpus", lambda cpus=cpus: cpus)
        assert numbers_of_devices(devices, None) == expected


def test_a_run_that_is_cut_stays_cut() -> None:
    config = SMALL.model_copy(update={"partition": (1,)})
    even = plan_one(SMALL, counted_times(SMALL, 1e9), float("inf"))
    uneven = plan_one(config, counted_times(SMALL, 1e9), float("inf"))
    assert uneven.config.partition == (1,) and even.config.partition == (4,)
    assert uneven.step_seconds > 1.5 * even.step_seconds


def test_bytes_for_people() -> None:
    assert [size(n) for n in (1, 999, 999_499, 999_600, 5e12)] == [
        *("1 byte", "999 bytes", "999 kB", "1 MB", "5 TB")
    ]
    # Whoever adds what is said to be missing has enough.
    assert [size_enough(n) for n in (7, 303_001, 303_000, 999_001)] == [
        *("7 bytes", "304 kB", "303 kB", "1 MB")
    ]


def plan(*words: str) -> int:
    return main(["plan", *words])


def test_a_huge_mini_batch_is_cut_into_no_more_than_makes_sense() -> None:
    train = SMALL.train.model_copy(update={"batch_size": 2**20})
    found = candidates(SMALL.model_copy(update={"train": train}), 2, ["1f1b"])
    assert max(config.train.micro_batches for config in found) == 128


def test_more_devices_than_units_are_left_idle() -> None:
    names = [name for name in GENERATORS if name != SEARCH]
    assert list(candidates(SMALL, 10**18, names)) == list(candidates(SMALL, 8 * 10**8, names))
    axes = {"has_replicas": True, "has_shards": True}
    many = [list(candidates(SMALL, n, ["1f1b"], **axes)) for n in (10**18, 10**17)]
    assert many[0] == many[1] != []


@pytest.mark.parametrize(
    ("schedule", "limit"), [("1f1b", 2.447e9), ("zb-h1", 3e9), ("gpipe", 2.56e9), ("1f1b", 1e12)]
)
def test_of_all_recomputation_that_fits_the_fastest_is_chosen(
    schedule: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cut that memory makes uneven can cost more than to recompute.
    base = preset("gpt2-small")
    run = {"stages": 4, "schedule": schedule, "partition": "balanced"}
    train = base.train.model_copy(update={"micro_batches": 8})
    config = base.model_copy(update=run | {"train": train})
    times = counted_times(config, 1e12)
    best, alone = plan_one(config, times, limit), []
    for mode in RECOMPUTE:
        monkeypatch.setattr("common.spec.plan.RECOMPUTE", (mode,))
        alone.append(plan_one(config, times, limit))
    assert isinstance(best, Plan)
    assert best.step_seconds == min(p.step_seconds for p in alone if isinstance(p, Plan))


@pytest.mark.parametrize(("schedule", "recompute"), [("zb-h1", "none"), ("1f1b", "full")])
def test_a_cut_is_balanced_by_what_the_schedule_computes(
    schedule: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B and W apart may take longer than BW in some units, and recomputation takes F twice."""
    draw = random.Random(schedule)
    monkeypatch.setattr("common.spec.plan.RECOMPUTE", (recompute,))
    train = SMALL.train.model_copy(update={"micro_batches": 16})
    config = SMALL.model_copy(update={"schedule": schedule, "train": train})
    for _ in range(60):
        seconds = {
            kind: {op.value: {1: 10 ** draw.uniform(-2, 0)} for op in Op}
            for kind in ("embedding", "block", "head")
        }
        times = UnitTimes(source="made up", seconds=seconds)
        cuts = [config.model_copy(update={"partition": (k,)}) for k in range(1, 8)]
        every = [plan for cut in cuts if (plan := plan_one(cut, times, math.inf))]
        best = plan_one(config.model_copy(update={"partition": "balanced"}), times, math.inf)
        assert best is not None
        assert best.step_seconds <= 1.03 * min(plan.step_seconds for plan in every)


def test_of_equal_steps_the_smallest_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    # One device has no bubble, whatever the schedule: not the last bit of a sum may decide.
    best, *others = make_plans(SMALL, 1, counted_times(SMALL, 1e12)).found
    assert others[-1].step_seconds == pytest.approx(best.step_seconds, rel=1e-6)
    assert best.config.chunks == 1 and best.peak_bytes == min(p.peak_bytes for p in others)
    assert plan("--devices", "1") == 0
    assert "limited by arithmetic: no device waits" in capsys.readouterr().out


def test_an_option_that_a_plan_decides_is_said_to_be_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for option in ("--stages=2", "--micro-batches=4", "--schedule=1f1b", "--compress=fp16"):
        assert plan("--devices", "2", option) == 2
        said = capsys.readouterr().err
        assert option.split("=")[0] in said and "plan" in said and "unknown" not in said


@pytest.mark.parametrize("axis", ["--replicas", "--tensor-parallel"])
def test_too_few_devices_for_one_stage_are_said(
    axis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--devices", "1", axis, "2") == 2
    assert "expected at least as many" in capsys.readouterr().err


def test_the_vocabulary_is_cut_where_a_plan_has_shards(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "2", "--batch-size", "4", "--schedules", "naive", "--shards-allowed"]
    assert plan(*words, "--link", "9999GB", "--vocab-parallel") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("run it: ") and "--vocab-parallel --" in said
    assert plan(*words, "--link", "1B", "--vocab-parallel") == 0
    assert "--vocab-parallel" not in capsys.readouterr().out


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, picture = tmp_path / "plans.json", tmp_path / "plans.png"
    words = ["--devices", "2", "--memory-limit", "60MB", "--json", str(data)]
    assert plan(*words, "--output", str(picture)) == 0
    said = capsys.readouterr().out
    assert "limited by" in said and "left out: gpipe" in said and picture.stat().st_size > 0
    found = json.loads(data.read_text())["plans"]
    assert found == sorted(found, key=lambda each: float(f"{each['step_seconds']:.9g}"))
    assert plan("--devices", "2", "--memory-limit", "1MB") == 1
    assert plan("--devices", "4", "--replicas-allowed", "--shards-allowed") == 2
    assert "expected --link SIZE" in capsys.readouterr().err
    few = ["--devices", "2", "--batch-size", "4", "--schedules", "1f1b", "--link", "9999GB"]
    assert plan(*few, "--replicas-allowed", "--shards-allowed") == 0
    assert " d  t " in capsys.readouterr().out
    assert plan("--devices", "2", "--memory-limit", "1MB") == 1
    assert "nothing fits: " in capsys.readouterr().out
    line = next(each for each in said.splitlines() if each.startswith("run it: triptych "))
    parsed: list[Any] = []
    monkeypatch.setattr(
        cli, "run", lambda parser, argv, is_long=False: parsed.append(parser.parse_args(argv)) or 0
    )
    assert main(shlex.split(line.removeprefix("run it: triptych "))) == 0
    (arguments,) = parsed
    assert read_run(arguments, reads_text=False).stages == found[0]["config"]["stages"]


def test_a_profile_measures_whole_units_of_one_pipeline() -> None:
    base = SMALL.model_copy(
        update={"replicas": 2, "tensor_parallel": 2, "vocab_parallel": True, "stages": 1}
    )
    for sequences in micro_batch_sizes(base.train.batch_size):
        run = profile_config(base, 4, "interleaved", sequences)
        assert (run.stages, run.replicas, run.tensor_parallel) == (4, 1, 1)


def test_a_profile_is_measured_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "profile.json", tmp_path / "plans.json"
    words = ["--devices", "2", "--framework", "torch", "--preset", "tiny", "--device", "cpu"]
    words += ["--batch-size", "2", "--json", str(data)]
    assert plan(*words, "--profile", str(path)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"profile: 4 runs of {' and '.join(names)}, stages = {stages}"
        for names, stages in (
            *((IN_CHUNKS, 2), (IN_CHUNKS, 1)),
            *((IN_ONE_PIECE[::-1], 1), (IN_ONE_PIECE[::-1], 2)),
        )
    ]
    kept = Profile.read(path)
    for times in (kept.times, kept.times.fewer[1]):
        assert all(times.of_part(["block.0"], op, b) > 0 for op in Op for b in (1, 2))
        assert times.peak_flops_per_device
    first = json.loads(data.read_text())
    assert plan(*words, "--costs", str(path)) == 0
    assert json.loads(data.read_text()) == first


def test_a_profile_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"schema_version": 2, "machine": "m", "version": "1", "devices": 2}
    kept = Profile(**head, config=SMALL, times=with_fixed_cost(0.01))
    path = tmp_path / "profile.json"
    path.write_text(kept.model_dump_json(exclude={"schema_version"}))
    assert plan("--devices", "2", "--costs", str(path)) == 2
    assert "a profile of another version of triptych; expected" in capsys.readouterr().err
    whole = json.loads(kept.model_dump_json())
    for place, wrong in (("seconds", {}), ("seconds", None), ("hop_seconds", -1.0)):
        path.write_text(json.dumps(whole | {"times": whole["times"] | {place: wrong}}))
        assert plan("--devices", "2", "--costs", str(path)) == 2
        assert "not a profile; expected" in capsys.readouterr().err
    nothing = {op.value: {"1": 0.0} for op in Op}
    for wrong_kinds in (dict.fromkeys(whole["times"]["seconds"], nothing), {"blok": nothing}):
        seconds = whole["times"]["seconds"] | wrong_kinds
        path.write_text(json.dumps(whole | {"times": whole["times"] | {"seconds": seconds}}))
        assert plan("--devices", "2", "--costs", str(path)) == 2
        assert "not a profile; expected" in capsys.readouterr().err
    # No sizes of one operation, a time that is none, an operation that is missing.
    times = (-1.0, math.inf, math.nan, 1e7)
    for wrong in ({"F": {}}, *({"F": {"1": t}} for t in times), {"F": {"0": 1.0}}, None):
        block = {} if wrong is None else whole["times"]["seconds"]["block"] | wrong
        seconds = whole["times"]["seconds"] | {"block": block}
        path.write_text(json.dumps(whole | {"times": whole["times"] | {"seconds": seconds}}))
        assert plan("--devices", "2", "--costs", str(path)) == 2
        assert "not a profile; expected" in capsys.readouterr().err
    path.write_text(kept.model_dump_json())
    assert plan("--devices", "2", "--costs", str(path)) == 0
    assert plan("--devices", "2", "--costs", str(path), "--d-model", "128") == 2
    assert plan("--devices", "3", "--costs", str(path)) == 2
    said = capsys.readouterr().err
    assert "is of d_model = 256" in said and "is of 2 devices" in said
