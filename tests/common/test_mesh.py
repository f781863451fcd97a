"""Who computes what: the mesh of stages and replicas, and the rows that a replica gets."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from common.report import mesh_picture
from common.runtime import agreement
from common.runtime.agreement import Disagreement, check_lines, clock_offset, gather
from common.runtime.reduce import Reduction
from common.schedule.action import Action, Op
from common.schedule.generators import make_schedule
from common.spec.data import IGNORED, Batch
from common.spec.mesh import Mesh, Place
from common.spec.run import RunConfig, TrainSpec, preset
from common.spec.traffic import traffic_bytes


def test_every_rank_has_one_place() -> None:
    mesh = Mesh(stages=3, replicas=2)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert places == [Place(0, 0), Place(0, 1), Place(1, 0), Place(1, 1), Place(2, 0), Place(2, 1)]
    assert [mesh.rank(*place) for place in places] == list(range(6))
    assert mesh.pipeline(1) == [1, 3, 5]
    assert mesh.copies(1) == [2, 3]


def test_the_lines_printed_at_the_start() -> None:
    assert Mesh(2, 2).describe(["a", "a", "b", "b"]) == [
        "a: replica 0 stage 0, replica 1 stage 0",
        "b: replica 0 stage 1, replica 1 stage 1",
    ]
    assert Mesh(5, 1).describe(["a", "a", "b", "b", "a"]) == [
        "a: replica 0 stages 0-1+4",
        "b: replica 0 stages 2-3",
    ]


@pytest.mark.parametrize(("rows", "replicas", "m"), [(7, 2, 2), (11, 3, 3), (8, 2, 4), (5, 1, 2)])
def test_no_row_is_dealt_twice_and_none_is_lost(rows: int, replicas: int, m: int) -> None:
    inputs = np.arange(rows * 4).reshape(rows, 4)
    targets = np.where(inputs % 3 == 0, IGNORED, inputs)
    batch = Batch(0, inputs, targets)
    dealt = [piece for r in range(replicas) for piece in batch.share(r, replicas, m)]
    assert len(dealt) == replicas * m
    assert_array_equal(np.concatenate([piece.samples for piece in dealt]), np.arange(rows))
    assert_array_equal(np.concatenate([piece.inputs for piece in dealt]), inputs)
    assert_array_equal(np.concatenate([piece.targets for piece in dealt]), targets)
    train = TrainSpec(batch_size=rows, micro_batches=m)
    largest = RunConfig(train=train, replicas=replicas).micro_batch_sizes
    assert largest == tuple(len(piece.samples) for piece in dealt[:m])


def test_too_many_replicas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"replicas x micro_batches = 12 .* expected at most 8"):
        RunConfig(train=TrainSpec(batch_size=8, micro_batches=4), replicas=3)


def test_a_chunk_is_reduced_behind_the_action_that_completes_it() -> None:
    schedule = make_schedule("zb-v", 2, 4, 2)
    for device, actions in enumerate(schedule.devices):
        done: list[Action] = []
        when: dict[int, int] = {}

        def start(chunk: int, done: list[Action] = done, when: dict[int, int] = when) -> None:
            when[chunk] = len(done)

        reduction = Reduction(actions, start, overlap=True)
        for action in actions:
            reduction.before()
            done.append(action)
        reduction.finish()
        # Every chunk once; the one whose gradient is whole first does not wait for the end.
        last = {a.chunk: n + 1 for n, a in enumerate(actions) if a.op in (Op.W, Op.BW)}
        assert when == last, device


def test_replicas_with_other_weights_are_named() -> None:
    mesh = Mesh(2, 2)
    numbers = [[5.0], [5.0], [6.0], [7.0]]

    def add(values: list[float]) -> list[float]:  # what the four processes together would get
        del values
        return [number for row in numbers for number in row]

    assert gather([1.0], 0, 4, add) == numbers
    with pytest.raises(Disagreement, match="stage 1: after 3 steps replica 1 has other weights"):
        check_lines(mesh, 0, {"w": np.ones(3)}, 3, add)


def test_clocks_are_compared_whatever_a_message_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is played: a message takes 0.5 s between hosts, and nothing within one."""
    hosts, ahead = ["a", "b", "b", "c"], {"a": 0.0, "b": 3600.0, "c": -7.0}
    time_of, added = [10.0, 10.2, 9.9, 11.0], [[0.0]] * len(hosts)
    own, together = threading.local(), threading.Barrier(len(hosts))

    def sleep(seconds: float) -> None:
        time_of[own.rank] += seconds

    def add(values: list[float]) -> list[float]:
        added[own.rank] = values
        together.wait()
        ways = [0.0 if host == hosts[own.rank] else 0.5 for host in hosts]
        now, total = max(map(sum, zip(time_of, ways, strict=True))), np.sum(added, axis=0)
        together.wait()
        time_of[own.rank] = now
        return total.tolist()

    clock = SimpleNamespace(
        perf_counter=lambda: time_of[own.rank] + ahead[hosts[own.rank]], sleep=sleep
    )
    monkeypatch.setattr(agreement, "time", clock)

    def offset(rank: int) -> float:
        own.rank = rank
        return clock_offset(hosts, rank, add)

    with ThreadPoolExecutor(len(hosts)) as pool:
        found = list(pool.map(offset, range(len(hosts))))
    assert found == pytest.approx([ahead[host] for host in hosts])


def test_the_picture_has_every_process_and_all_that_travels() -> None:
    small = preset("small").model_copy(update={"schedule": "1f1b"})
    runs = [
        small.model_copy(update={"replicas": d, "tensor_parallel": t}) for d, t in ((2, 1), (2, 2))
    ]
    widest = mesh_picture.most_of([small, *runs])
    assert widest is not None and mesh_picture.most_of([small]) is None
    texts = [text.get_text() for text in mesh_picture.draw_mesh(widest).axes[0].texts]
    assert sum("shard" in text for text in texts) == Mesh.of(widest).size == 8
    shown = sum(float(text.removesuffix(" MB")) for text in texts if text.endswith(" MB"))
    assert shown == pytest.approx(sum(traffic_bytes(widest).values()) / 1e6, rel=0.01)
