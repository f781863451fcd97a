"""Replicas: fleet's groups, the order of sums over sockets, and what the parity ladder does not
ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.runtime.world import World
from common.spec.mesh import Mesh
from paddle_impl.groups import Joined
from paddle_impl.ranks import join_pipeline
from tests.engines import (
    Make,
    assert_within,
    batch,
    check_predictions,
    check_units_alone,
    different,
    oracle_of,
    train,
)
from tests.paddle.ranks import Ranks

RAGGED: dict[str, Any] = {"batch_size": 7, "micro_batches": 2}
"""For two replicas: micro-batches of 2, 2 and 2, 1 sequences."""


def replicated(make: Make, d: int, stages: int, schedule: str, **options: Any) -> Any:
    run = {"replicas": d, "threads": d * stages} | options.pop("run", {})
    return make(stages, schedule, run=run, train=RAGGED, dropout=0.1, **options)


@pytest.fixture(scope="module")
def three(ranks: Callable[[Mesh], Ranks]) -> Ranks:
    return ranks(Mesh(stages=1, replicas=3))


@pytest.mark.parametrize("mesh", [Mesh(2, 2), Mesh(2, 1, 2)])
def test_fleets_groups_are_those_of_the_mesh(mesh: Mesh, ranks: Callable[[Mesh], Ranks]) -> None:
    for rank, found in enumerate(ranks(mesh).ask(_fleets_groups)):
        place = stage, replica, shard = mesh.place(rank)
        line = mesh.pipeline(mesh.line(rank))
        groups = [line, mesh.copies(stage, shard), mesh.shard_group(stage, replica)]
        assert found == (place, groups)


def _fleets_groups() -> tuple[tuple[int, int, int], list[list[int]]]:
    from paddle.distributed import fleet

    group = fleet.get_hybrid_communicate_group()
    axes = [group.get_pipe_parallel_group(), group.get_data_parallel_group()]
    axes.append(group.get_model_parallel_group())
    place = group.get_stage_id(), group.get_data_parallel_rank(), group.get_model_parallel_rank()
    return place, [axis.ranks for axis in axes]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_sums_are_in_the_order_of_the_ranks_wherever_an_element_lies(
    three: Ranks, dtype: str
) -> None:
    terms = [_term(rank, dtype) for rank in range(3)]
    wanted = (terms[0] + terms[1]) + terms[2]
    for found in three.ask(_sums, dtype):
        for sums in found:
            np.testing.assert_array_equal(np.concatenate(sums), wanted)


def _term(rank: int, dtype: str) -> Any:
    return (np.random.default_rng(rank).standard_normal(1001) * 1000).astype(dtype)


def _sums(dtype: str) -> list[list[Any]]:
    """Of one tensor, and of pieces, some smaller than the group; all at once, and in the
    background, before one that waits for its turn.
    """
    import paddle
    from paddle.distributed import all_reduce, get_rank

    found = []
    for cuts in ([], [1, 3, 500, 501]):
        for sync in (True, False):
            pieces = np.split(_term(get_rank(), dtype), cuts)
            tensors = [paddle.to_tensor(piece) for piece in pieces]
            tasks = [all_reduce(tensor, sync_op=sync) for tensor in tensors]
            last = paddle.ones([2])
            all_reduce(last)
            assert last.tolist() == [3, 3]
            assert all(task.wait() for task in tasks if not sync)
            found.append([tensor.numpy() for tensor in tensors])
    return found


@pytest.mark.parametrize("tied_head", [False, True])
def test_schedules_and_both_ways_to_reduce_give_the_same_bits(make: Make, tied_head: bool) -> None:
    first = None
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("1f1b", {}),
        ("zb-h1", {"reduce": "flush"}),
        ("zb-v", {"chunks": 2}),
    )
    for schedule, run in cases:
        engine = replicated(make, 2, 2, schedule, run=run, tied_head=tied_head)
        found = train(engine, range(2))
        first = first or found
        assert different(first, found) == [], (schedule, run)


def test_fleets_own_pipeline_has_the_bits_of_ours(make: Make) -> None:
    """Also of a tied head, whose two ends are added up when the replicas are."""
    found = []
    for executor in ("table", "native"):
        run = {"replicas": 2, "threads": 4, "executor": executor}
        engine = make(2, run=run, dropout=0.1, tied_head=True)
        found.append(train(engine, range(2)))
    assert different(*found) == []


@pytest.mark.parametrize("tied_head", [False, True])
def test_the_plain_loop_has_the_oracles_gradients_in_paddles_data_parallel(
    make: Make, tied_head: bool
) -> None:
    engine = replicated(
        make, 2, 1, "naive", dtype="float64", tied_head=tied_head, run={"executor": "plain"}
    )
    oracle = oracle_of(engine)
    for step in range(2):
        losses = [{"loss": one.forward_backward(batch(engine, step))} for one in (engine, oracle)]
        assert_within(*losses, "loss", "float64")
        assert_within(engine.gradients(), oracle.gradients(), "gradient", "float64")
        norms = [{"norm": one.apply_gradients(step)} for one in (engine, oracle)]
        assert_within(*norms, "loss", "float64")
    given = batch(engine, 2)
    losses = [{"loss": one.evaluate(given)} for one in (engine, oracle)]
    assert_within(*losses, "loss", "float64")
    logits = [{"logits": one.predict(given.inputs)} for one in (engine, oracle)]
    assert_within(*logits, "activation", "float64")


def test_three_replicas_have_the_oracles_gradients_and_the_bits_of_another_schedule(
    make: Make,
) -> None:
    options = {
        "run": {"replicas": 3, "threads": 3},
        "train": {"batch_size": 11, "micro_batches": 3},
    }
    engines = [make(1, name, dtype="float64", **options) for name in ("1f1b", "gpipe")]
    oracle, given = oracle_of(engines[0]), batch(engines[0])
    losses = [{"loss": one.forward_backward(given)} for one in (engines[0], oracle)]
    assert_within(*losses, "loss", "float64")
    assert_within(engines[0].gradients(), oracle.gradients(), "gradient", "float64")
    engines[0].reset(oracle.weights())
    assert different(*(train(engine, range(2)) for engine in engines)) == []


def test_units_alone_are_the_oracles_over_all_replicas(make: Make) -> None:
    def two(stages: int, **options: Any) -> Any:
        options["run"] |= {"replicas": 2, "threads": 4}
        return make(stages, **options)

    check_units_alone(two, "float64", "pre", True)


def test_every_replica_predicts_everything(make: Make) -> None:
    run = {"replicas": 2, "threads": 4}
    check_predictions(make(2, dtype="float64", run=run, train=RAGGED), (7, 16), (2, 16), (5, 3))


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_is_refused(size: int) -> None:
    world = World(0, ("127.0.0.1:1",) * size)
    expected = f"stages x replicas = 2, but {size} processes were started; expected 2"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        join_pipeline(world, Mesh(2, 1), "cpu")


def test_gpus_of_two_hosts_are_not_shared() -> None:
    endpoints = ("a:1", "a:2", "b:1", "b:2")

    def joined(*devices: str) -> Joined:
        return Joined(World(0, endpoints), Mesh(2, 2), devices)

    assert not joined("gpu:0", "gpu:1", "gpu:0", "gpu:1").through_host
    assert joined("gpu:0", "gpu:0", "gpu:0", "gpu:1").through_host
    assert joined("cpu", "cpu", "cpu", "cpu").through_host
