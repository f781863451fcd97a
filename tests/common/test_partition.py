"""Partitions: never an empty stage, nothing lost, and the balanced one is the best there is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schedule.generators import make_schedule
from common.spec.parameters import parameter_shapes, unit_names
from common.spec.partition import (
    balanced_boundaries,
    balanced_over_devices,
    even_boundaries,
    plan_partition,
    unit_costs,
)
from common.spec.run import PRESETS, RunConfig, TransformerSpec, preset


@given(st.integers(1, 60), st.data())
def test_every_even_plan_is_whole(num_layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, num_layers + 2))
    config = RunConfig(model=TransformerSpec(num_layers=num_layers), stages=stages)
    plan = plan_partition(config)
    assert [unit for part in plan.parts for unit in part] == unit_names(config.model)
    assert len(plan.parts) == stages and all(plan.parts)
    if stages <= num_layers:
        blocks = [sum(unit.startswith("block") for unit in part) for part in plan.parts]
        assert max(blocks) - min(blocks) <= 1


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 20), st.sampled_from(["loop", "vee"]))
def test_chunks_load_the_devices_evenly(
    stages: int, chunks: int, more: int, placement: str
) -> None:
    parts = stages * chunks
    edges = [1, *even_boundaries(parts + more, stages, chunks), 1 + parts + more]
    blocks = [0] * stages
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        chunk, place = divmod(k, stages)
        blocks[stages - 1 - place if placement == "vee" and chunk % 2 else place] += b - a
    assert max(blocks) - min(blocks) <= 1


def test_a_remainder_is_not_lost() -> None:
    assert even_boundaries(30, 4) == [8, 16, 24]  # 7 blocks and the embedding, 8, 8, 7 and the head


def loads(costs: Sequence[int], inner: Sequence[int], devices: Sequence[int]) -> tuple[int, int]:
    """The largest device and the largest part."""
    edges = [0, *inner, len(costs)]
    assert all(a < b for a, b in itertools.pairwise(edges))
    parts = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
    of_device = [
        sum(part for part, d in zip(parts, devices, strict=True) if d == device)
        for device in devices
    ]
    return max(of_device), max(parts)


def best_loads(costs: Sequence[int], devices: Sequence[int]) -> tuple[int, int]:
    """Of every cut there is."""
    cuts = itertools.combinations(range(1, len(costs)), len(devices) - 1)
    return min(loads(costs, inner, devices) for inner in cuts)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_balanced_is_the_smallest_largest_stage_with_the_latest_cuts(
    costs: list[int], data: st.DataObject
) -> None:
    inner = balanced_boundaries(costs, data.draw(st.integers(1, len(costs))))
    parts, devices = len(inner) + 1, range(len(inner) + 1)
    for k in range(parts - 1, 0, -1):
        units = costs[: inner[k]] if k < parts - 1 else costs
        assert loads(units, inner[:k], devices[: k + 1]) == (
            best := best_loads(units, devices[: k + 1])
        )
        for later in range(inner[k - 1] + 1, len(units)):
            assert max(best_loads(units[:later], devices[:k])[0], sum(units[later:])) > best[0]


@given(
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(1, 3),
    st.integers(2, 3),
    st.data(),
)
def test_balanced_over_devices_is_the_best_there_is(
    embedding: int, block: int, head: int, stages: int, chunks: int, data: st.DataObject
) -> None:
    parts = stages * chunks
    loop = [k % stages for k in range(parts)]
    vee = [k if k < stages else parts - 1 - k for k in range(parts)] if chunks == 2 else loop
    anyhow = st.lists(st.integers(0, stages - 1), min_size=parts, max_size=parts)
    devices = data.draw(st.one_of(st.sampled_from([loop, vee]), anyhow))
    num_layers = data.draw(st.integers(max(1, parts - 2), parts + 2))
    costs = [embedding, *[block] * num_layers, head]
    inner = balanced_over_devices(embedding, block, head, num_layers, devices)
    assert loads(costs, inner, devices) == best_loads(costs, devices)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v", "file"])
@pytest.mark.parametrize("name", PRESETS)
def test_balanced_is_never_above_even(name: str, schedule: str, tmp_path: Path) -> None:
    for stages, chunks in ((1, 2), (2, 2), (4, 2), (2, 3), (4, 3)):
        model, train = preset(name).model, preset(name).train
        if stages * chunks > model.num_layers + 2 or (schedule == "zb-v" and chunks > 2):
            continue
        made = make_schedule(
            "zb-v" if chunks == 2 else "interleaved", stages, train.micro_batches, chunks
        )
        (tmp_path / "table.txt").write_text(str(made))
        run = {
            "schedule": schedule if schedule != "file" else f"file:{tmp_path / 'table.txt'}",
            "stages": stages,
        }
        config = preset(name).model_copy(update=run | {"chunks": chunks})
        found = make_schedule(config.schedule, stages, train.micro_batches, chunks)
        devices = [device for device, _ in found.location]
        costs = [cost.forward_flops for cost in unit_costs(model, train)]
        even, balanced = (
            loads(
                costs,
                plan_partition(config.model_copy(update={"partition": how})).boundaries[1:-1],
                devices,
            )
            for how in ("even", "balanced")
        )
        assert balanced <= even


@pytest.mark.parametrize(
    ("name", "stages", "schedule", "largest"),
    [
        ("small", 2, "interleaved", 1.013),
        ("small", 2, "zb-v", 1.013),
        ("gpt2-small", 4, "zb-v", 1.084),
    ],
)
def test_the_largest_device_over_the_mean(
    name: str, stages: int, schedule: str, largest: float
) -> None:
    config = preset(name).model_copy(
        update={"stages": stages, "chunks": 2, "schedule": schedule, "partition": "balanced"}
    )
    costs = [cost.forward_flops for cost in unit_costs(config.model, config.train)]
    location = make_schedule(schedule, stages, config.train.micro_batches, 2).location
    of_device, _ = loads(
        costs, plan_partition(config).boundaries[1:-1], [device for device, _ in location]
    )
    assert of_device / (sum(costs) / stages) == pytest.approx(largest, abs=5e-4)


def test_balanced_refuses_more_parts_than_units() -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        balanced_boundaries([1, 1, 1], 4)


def test_explicit_boundaries() -> None:
    plan = plan_partition(RunConfig(stages=3, partition="1,5"))
    assert plan.parts == (("embedding",), ("block.0", "block.1", "block.2", "block.3"), ("head",))
    assert plan.boundaries == (0, 1, 5, 6)
    assert plan.part_of("block.2") == 1


def test_costs_by_hand() -> None:
    model = TransformerSpec(
        vocab_size=10, context_length=3, num_layers=1, d_model=4, num_heads=1, d_ff=8
    )
    train = preset("tiny").train.model_copy(update={"batch_size": 4, "micro_batches": 2})
    embedding, block, head = unit_costs(model, train)
    tokens = 2 * 3
    assert embedding.parameters == 10 * 4 + 3 * 4 and embedding.forward_flops == 0
    assert block.parameters == 4 * 16 + 3 * 4 + 2 * 32 + 8 + 4 + 4 * 4
    assert block.forward_flops == tokens * (2 * (4 * 16 + 2 * 32) + 4 * 3 * 4)
    assert head.forward_flops == tokens * 2 * 4 * 10
    assert block.activation_bytes == 4 * tokens * 4
    costs = unit_costs(model, train)
    assert sum(cost.parameters for cost in costs) == sum(
        shape[0] * (shape[1] if len(shape) == 2 else 1)
        for shape in parameter_shapes(model).values()
    )
