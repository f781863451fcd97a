"""The pipeline on GPUs that are not there (tests/campaigns/fake_gpu/fake_paddle.cc) gives the bits
of one stage on the CPU, and hangs in no schedule.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.runtime.job import Generation, Job, JobFile, Part
from common.runtime.patience import Patience
from common.schedule.generators import GENERATORS, default_chunks
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from tests.engines import Arrays, Make, ask, batch, decoded, different, maker, small, train
from tests.paddle import fake_gpus
from tests.paddle.ranks import Pipeline, Ranks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

LONG: dict[str, Any] = {"train": {"batch_size": 16, "micro_batches": 8}}

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    # stages, schedule, and further arguments of `make`
    name: (2, name, {"run": {"chunks": default_chunks(name)}})
    for name in GENERATORS
} | {
    "1f1b on four": (4, "1f1b", LONG),
    "zb-h2 on four": (4, "zb-h2", LONG),
    "fleet's own": (2, "1f1b", {"run": {"executor": "native"}, "tied_head": True}),
    "tied": (2, "1f1b", {"tied_head": True}),
    "tied on one rank": (2, "zb-v", {"tied_head": True, "run": {"chunks": 2}}),
    "dropout": (2, "zb-h1", {"dropout": 0.1}),
    "recomputation": (2, "zb-h1", {"dropout": 0.1, "run": {"recompute": "every-1"}}),
    "uneven": (
        2,
        "1f1b",
        {"train": {"micro_batches": 3}, "run": {"sequence_lengths": "random"}},
    ),
    "float64": (2, "1f1b", {"dtype": "float64"}),
}

REPLICATED: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    # replicas, stages, ...
    "two of two": (2, 2, "1f1b", {"tied_head": True, "dropout": 0.1}),
    "two of two, chunks": (2, 2, "zb-v", {"run": {"chunks": 2}, "train": {"micro_batches": 2}}),
    "three": (3, 1, "gpipe", {"train": {"batch_size": 7, "micro_batches": 2}}),
    "shards": (
        *(1, 1, "zb-h1"),
        {"dropout": 0.1, "norm": "post", "run": {"tensor_parallel": 2, "vocab_parallel": True}},
    ),
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_gpus.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def fake_ranks(plugin: Path) -> Iterator[Callable[[Mesh, int], Ranks]]:
    """By their mesh and the number of GPUs."""
    started: dict[tuple[Mesh, int], Ranks] = {}

    def of(mesh: Mesh, gpus: int) -> Ranks:
        if (mesh, gpus) not in started or not started[mesh, gpus].alive:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in fake_gpus.environment(plugin, gpus, late_us=200).items():
                    patch.setitem(os.environ, name, value)
                started[mesh, gpus] = Ranks(mesh, plugin)
        return started[mesh, gpus]

    yield of
    for one in started.values():
        one.end()


@pytest.fixture
def on_gpus(fake_ranks: Callable[[Mesh, int], Ranks]) -> Iterator[Callable[[int], Make]]:
    """`on_gpus(n)` is a `make` whose ranks find `n` GPUs."""
    makers: list[Iterator[Make]] = []

    def of(gpus: int) -> Make:
        def build(config: RunConfig) -> Pipeline:
            mesh = Mesh.of(config)
            return Pipeline(fake_ranks(mesh, gpus), config)

        makers.append(maker("paddle", build))
        make = next(makers[-1])

        def on_auto(*arguments: Any, run: dict[str, Any] | None = None, **options: Any) -> Any:
            return make(*arguments, run={"device": "auto"} | (run or {}), **options)

        return on_auto

    yield of
    for one in makers:
        next(one, None)


def everything(engine: Any) -> Arrays:
    """Two steps of training, and every other pass."""
    given = batch(engine)
    seen = train(engine, range(2)) | {"held-out loss": np.array(engine.evaluate(given))}
    outputs = {
        f"{key.unit} {key.micro_batch}": array for key, array in engine.unit_outputs(given).items()
    }
    return seen | outputs | {"logits": engine.predict(given.inputs)}


def expected(make: Make, options: dict[str, Any]) -> Arrays:
    """Of one stage on the CPU."""
    kept = {"sequence_lengths", "recompute"}
    run = {key: value for key, value in options.get("run", {}).items() if key in kept}
    return everything(make(1, "1f1b", **options | {"run": run}))


@pytest.mark.parametrize("case", CASES)
def test_gpus_give_the_bits_of_the_cpu(
    case: str, make: Make, on_gpus: Callable[[int], Make]
) -> None:
    stages, schedule, options = CASES[case]
    engine = on_gpus(8)(stages, schedule, **options)
    assert different(expected(make, options), everything(engine)) == []
    assert engine.environment()["stage_devices"] == [f"fakegpu:{i}" for i in range(stages)]
    if schedule == "1f1b":
        check_times(engine.events())


@pytest.mark.parametrize(
    ("stages", "schedule", "run"), [(3, "1f1b", {}), (2, "zb-v", {"chunks": 2})]
)
def test_what_is_generated_goes_round_on_gpus(
    stages: int, schedule: str, run: dict[str, Any], make: Make, on_gpus: Callable[[int], Make]
) -> None:
    options = {"dtype": "float64", "num_layers": 4}
    wish = Generation(prompt=(1, 2, 3), tokens=9, samples=3, temperature=1.0, eos=7)
    cpu, gpus = make(1, "1f1b", **options), on_gpus(8)(stages, schedule, run=run, **options)
    tokens = [ask(engine, decoded, wish)["found"].tokens for engine in (cpu, gpus)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("case", REPLICATED)
def test_copies_and_shards_on_gpus_give_the_bits_of_those_on_cpus(
    case: str, make: Make, on_gpus: Callable[[int], Make]
) -> None:
    replicas, stages, schedule, options = REPLICATED[case]
    run = {"replicas": replicas} | options.get("run", {})
    run["threads"] = replicas * stages * run.get("tensor_parallel", 1)
    engines = [one(stages, schedule, **options | {"run": run}) for one in (make, on_gpus(8))]
    assert different(*map(everything, engines)) == []


def check_times(events: dict[int, list[Any]]) -> None:
    """Every action begins when it is ready, which is when the one before has ended."""
    for own in events.values():
        times = [
            t
            for event in own
            for t in (event.ready_seconds, event.start_seconds, event.end_seconds)
        ]
        assert times == sorted(times) and times[0] < times[-1] < times[0] + 1000


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_neighbours_share_a_gpu_where_there_are_too_few(
    schedule: str, make: Make, on_gpus: Callable[[int], Make]
) -> None:
    options = {"tied_head": True, "dropout": 0.1}
    engine = on_gpus(1)(2, schedule, **options)
    assert different(expected(make, options), everything(engine)) == []
    said = engine.environment()
    assert (said["stage_devices"], said["messages"]) == (["fakegpu:0"] * 2, "sockets")


# ----------------------------------------------------------------------------------------- mutants


def test_one_communicator_for_both_directions_hangs(on_gpus: Callable[[int], Make]) -> None:
    """So the fake GPUs wait as NCCL does, and a hang in a schedule would show."""
    engine = on_gpus(7)(2)
    engine.on_all(_one_group_for_both_directions)
    given, ended = batch(engine), threading.Event()

    def step() -> None:
        with contextlib.suppress(RuntimeError, OSError):  # its ranks are killed
            engine.forward_backward(given)
            ended.set()

    stuck = threading.Thread(target=step, daemon=True)
    stuck.start()
    patience = Patience(os.getpid(), idle_seconds=3)
    while stuck.is_alive() and not patience.is_over():
        stuck.join(0.1)
    engine.end()
    stuck.join()
    assert not ended.is_set()


def _one_group_for_both_directions(engine: Any) -> None:
    from paddle_impl import groups

    groups.one_way[1, 0] = groups.one_way[0, 1]


def test_a_communicator_that_is_not_made_at_build_holds_up_a_pass(
    on_gpus: Callable[[int], Make],
) -> None:
    engine = on_gpus(6)(2)
    engine.on_all(_groups_without_a_message)
    with pytest.raises(RuntimeError, match="a communicator was made in a pass"):
        engine.forward_backward(batch(engine))


def _groups_without_a_message(engine: Any) -> None:
    import paddle

    from paddle_impl import groups

    groups.one_way |= {pair: paddle.distributed.new_group(list(pair)) for pair in groups.one_way}


def start(plugin: Path, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m paddle_impl` on fake GPUs, after the statements `before`."""
    job = Job(
        config=small("paddle", 2, run={"device": "auto"}, train={"steps": 2}), out=str(folder)
    )
    JobFile(jobs=(job,)).write(folder / "jobs.json")
    main = ["import sys", *before, "from paddle_impl.__main__ import main"]
    code = "; ".join([*main, f"sys.exit(main([{str(folder / 'jobs.json')!r}]))"])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | fake_gpus.environment(plugin),
        capture_output=True,
        text=True,
        check=False,
    )


def test_ranks_on_gpus_are_spawned(plugin: Path, tmp_path: Path) -> None:
    done = start(plugin, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    part = Part.model_validate_json((tmp_path / "part-1.json").read_text())
    assert part.environment["stage_devices"] == ["fakegpu:0", "fakegpu:1"]


def test_ranks_that_are_forked_find_no_gpu(plugin: Path, tmp_path: Path) -> None:
    fork = "import multiprocessing as m; of = m.get_context; m.get_context = lambda _: of('fork')"
    done = start(plugin, tmp_path, fork)
    assert done.returncode == 1
    assert "this process was forked after the runtime had started" in done.stderr
