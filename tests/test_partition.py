"""Partitions: never an empty stage, nothing lost, and the balanced one is the best there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.partition import balanced_boundaries, even_boundaries, plan_partition, unit_costs
from common.spec import RunConfig, TransformerSpec, preset
from common.weights import parameter_shapes, unit_names


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
def test_chunks_load_the_devices_evenly(stages: int, chunks: int, more: int, placement: str) -> None:
    parts = stages * chunks
    edges = [1, *even_boundaries(parts + more, stages, chunks), 1 + parts + more]
    blocks = [0] * stages
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        chunk, place = divmod(k, stages)
        blocks[stages - 1 - place if placement == "vee" and chunk % 2 else place] += b - a
    assert max(blocks) - min(blocks) <= 1


def test_a_remainder_is_not_lost() -> None:
    assert even_boundaries(30, 4) == [8, 16, 24]  # 7 blocks and the embedding, 8, 8, 7 and the head


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_balanced_is_the_smallest_largest_stage(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def largest(inner: tuple[int, ...] | list[int]) -> int:
        edges = [0, *inner, len(costs)]
        assert all(a < b for a, b in itertools.pairwise(edges))
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

    best = min(largest(inner) for inner in itertools.combinations(range(1, len(costs)), parts - 1))
    assert largest(balanced_boundaries(costs, parts)) == best


def test_balanced_refuses_more_parts_than_units() -> None:
    with pytest.raises(ValueError, match="right would be 1 to 3"):
        balanced_boundaries([1, 1, 1], 4)


def test_explicit_boundaries() -> None:
    plan = plan_partition(RunConfig(stages=3, partition="1,5"))
    assert plan.parts == (("embedding",), ("block.0", "block.1", "block.2", "block.3"), ("head",))
    assert plan.boundaries == (0, 1, 5, 6)
    assert plan.part_of("block.2") == 1


def test_costs_by_hand() -> None:
    model = TransformerSpec(vocab_size=10, context_length=3, num_layers=1, d_model=4, num_heads=1, d_ff=8)
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
        shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in parameter_shapes(model).values()
    )
