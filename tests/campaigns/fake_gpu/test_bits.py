"""The engine on GPUs gives the CPU's bits, however late the GPUs are.

Without bfloat16: PyTorch's CPU kernels keep other statistics of a LayerNorm there than its CUDA
kernels.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.harness.probes import read_probe
from common.runtime.executor import StageFailure, unwatched
from common.runtime.inference import generate
from common.runtime.job import Generation, Job
from common.schedule.action import Action, Op
from tests.campaigns.fake_gpu.late_kernels import queue
from tests.engines import ELSEWHERE, Arrays, Make, batch, check_resumes, different, small, train
from tests.every_framework import check_kernels
from tests.parity.ladder import first_different_bits
from torch_impl import backward, streams
from torch_impl.engine import build_engine
from torch_impl.roofline import prepare
from torch_impl.shard_threads import run_lines

PAUSE_SECONDS = int(os.environ.get("FAKE_PAUSE_MS", "30")) / 1e3
"""Of a stream that is to be late."""
DEEP: dict[str, Any] = {"num_layers": 6}
VEE: dict[str, Any] = {"run": {"chunks": 2}, **DEEP}
LONG: dict[str, Any] = {"train": {"batch_size": 16, "micro_batches": 8}, **DEEP}

CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    # GPUs, stages, schedule, and further arguments of `make`
    "unpartitioned": (1, 1, "1f1b", {}),
    "naive": (2, 2, "naive", {}),
    "gpipe": (4, 4, "gpipe", LONG),
    "1f1b": (4, 4, "1f1b", LONG),
    "interleaved": (2, 2, "interleaved", VEE),
    "zb-h1": (4, 4, "zb-h1", LONG),
    "zb-h2": (4, 4, "zb-h2", LONG),
    "zb-v": (2, 2, "zb-v", VEE),
    "search": (2, 2, "search", {}),
    "pairs": (2, 2, "dualpipev", {"dropout": 0.1, "tied_head": True, **VEE}),
    "pairs of one chunk": (4, 4, "interleaved-overlap", LONG),
    "pairs on one GPU": (
        *(1, 2, "interleaved-overlap"),
        {"num_layers": 6, "run": {"chunks": 2, "recompute": "every-1"}, "dropout": 0.1},
    ),
    "eight GPUs": (8, 8, "1f1b", DEEP),
    "shared by two": (1, 2, "zb-h1", {}),
    "shared by some": (2, 3, "1f1b", {"tied_head": True, **DEEP}),
    "vee on one GPU": (1, 2, "zb-v", VEE),
    "dropout": (2, 2, "zb-h1", {"dropout": 0.1}),
    "tied": (2, 2, "1f1b", {"tied_head": True}),
    "recomputation": (2, 2, "zb-h1", {"dropout": 0.1, "run": {"recompute": "every-1"}}),
    "uneven": (
        2,
        2,
        "1f1b",
        {"train": {"micro_batches": 3}, "run": {"sequence_lengths": "random"}},
    ),
    "float64": (2, 2, "1f1b", {"dtype": "float64"}),
    "SGD": (2, 2, "1f1b", {"train": {"optimizer": "sgd", "momentum": 0.9}}),
}


def everything(
    folder: Path, make: Make, stages: int, schedule: str, options: dict[str, Any]
) -> Arrays:
    """Return what an engine gives: of two steps of training, then of every other pass."""
    engine = make(stages, schedule, **options)
    given = batch(engine)
    seen = train(engine, range(2)) | {"held-out loss": np.array(engine.evaluate(given))}
    seen |= {str(key): array for key, array in engine.unit_outputs(given).items()}
    wish = Generation(prompt=(1, 2, 3), tokens=3, samples=2)
    tokens = np.array(
        generate(engine, Job(config=engine.config, out=str(folder), generation=wish)).tokens
    )
    held = {f"held {d}": np.array(n) for d, n in engine.held_bytes_peak().items()}
    return seen | held | {"logits": engine.predict(given.inputs), "generated": tokens}


@pytest.mark.parametrize("case", CASES)
def test_gpus_give_the_bits_of_the_cpu(
    case: str, make: Make, on_gpus: Callable[[int], Make], tmp_path: Path
) -> None:
    gpus, *rest = CASES[case]
    assert (
        different(everything(tmp_path, make, *rest), everything(tmp_path, on_gpus(gpus), *rest))
        == []
    )


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_shards_give_the_bits_of_the_cpu(
    gpus: int, on_gpus: Callable[[int], Make], tmp_path: Path
) -> None:
    """Two stages of two shards, as threads: all on one GPU, two on each, or one."""
    on_gpus(gpus)
    found = []
    for device in ("cpu", "cuda"):
        run = {"tensor_parallel": 2, "vocab_parallel": True, "device": device, "threads": 4}
        model = {"train": {"steps": 3}, "dropout": 0.1, "tied_head": True}
        config = small("torch", 2, "zb-h1", run=run, **model)
        job = Job(config=config, out=str(tmp_path / device), kind="probe")
        for folder in job.folders:
            folder.mkdir()
        run_lines(job, build_engine)
        found.append(read_probe(Path(job.out), same_copies=True))
    assert first_different_bits(*found) is None


@pytest.mark.parametrize("gpus", [1, 2])
def test_training_goes_on_from_weights_and_moments(
    gpus: int, on_gpus: Callable[[int], Make]
) -> None:
    check_resumes(on_gpus(gpus), ELSEWHERE[-1:], num_layers=4)


def test_the_watch_is_told_which_action_hangs_although_the_host_is_ahead(
    on_gpus: Callable[[int], Make],
) -> None:
    engine, goes_on, noted = on_gpus(2)(2), threading.Event(), list[str]()
    stage, whole_backward = engine.stages[1], engine.stages[1].backward

    def hang(micro_batch: int, *rest: Any) -> Any:
        if micro_batch == 1:
            queue(stage.device, goes_on.wait)
        return whole_backward(micro_batch, *rest)

    def on_action(device: int, action: Action | None) -> None:
        if device == 1:
            if str(action) == "BW1" and "BW2" in noted:
                goes_on.set()
            noted.append(str(action))

    stage.backward, engine.on_action = hang, on_action
    engine.forward_backward(batch(engine))  # ends only because BW1 was named again, once or more
    assert goes_on.is_set()


def test_the_halves_of_a_pair_run_at_the_same_time(on_gpus: Callable[[int], Make]) -> None:
    """Each F of a pair waits for the end of its BW here: in one stream it would wait in vain."""
    engine, met = on_gpus(2)(2, "interleaved-overlap"), list[bool]()
    stage, row = engine.stages[0], engine.schedule.devices[0]
    is_over = {action: threading.Event() for action in row if action.overlaps}
    beside = {first: second for first, second in itertools.pairwise(row) if second.overlaps}
    forward, whole_backward = stage.forward, stage.backward

    def late_forward(micro_batch: int, chunk: int, x: Any) -> Any:
        other = beside.get(Action(Op.F, micro_batch, chunk))
        if other is not None:
            queue(stage.device, lambda: met.append(is_over[other].wait(60)))
        return forward(micro_batch, chunk, x)

    def noted_backward(micro_batch: int, chunk: int, gradient: Any) -> Any:
        result = whole_backward(micro_batch, chunk, gradient)
        if (action := Action(Op.BW, micro_batch, chunk, overlaps=True)) in is_over:
            queue(stage.device, is_over[action].set)
        return result

    stage.forward, stage.backward = late_forward, noted_backward
    engine.forward_backward(batch(engine))
    assert beside and met == [True] * len(beside)
    events = engine.events()[0]
    assert all(one.end_seconds <= two.start_seconds for one, two in itertools.pairwise(events))


@pytest.mark.parametrize(("schedule", "options"), [("interleaved-overlap", {}), ("dualpipev", VEE)])
@pytest.mark.parametrize("late", ["_main", "_side"])
def test_a_late_stream_is_waited_for(
    late: str,
    schedule: str,
    options: dict[str, Any],
    make: Make,
    on_gpus: Callable[[int], Make],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enter, weights = streams.PairedStreams.enter, backward.backward_weight
    slow = set[torch.cuda.Stream]()

    def pause() -> None:
        if (here := torch.cuda.current_stream()) in slow:
            queue(here.device, lambda: time.sleep(PAUSE_SECONDS))

    def enter_late(pairs: Any, action: Action) -> None:
        enter(pairs, action)
        slow.add(getattr(pairs, late))
        pause()

    def weights_late(waiting: Any) -> None:
        pause()
        weights(waiting)

    monkeypatch.setattr(streams.PairedStreams, "enter", enter_late)
    monkeypatch.setattr(backward, "backward_weight", weights_late)
    expected = train(make(2, schedule, **options), range(2))
    engine = on_gpus(2)(2, schedule, **options)

    def fail(device: int, action: Action | None) -> None:
        if device == 1 and action == engine.schedule.devices[1][-1]:
            raise RuntimeError("no memory left")

    engine.on_action = fail
    with pytest.raises(StageFailure, match="no memory left"):
        engine.forward_backward(batch(engine))
    engine.on_action = unwatched
    assert different(expected, train(engine, range(2))) == []


def test_pytorchs_own_sanitizer_finds_no_race(
    on_gpus: Callable[[int], Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls a race what no event orders; on one GPU only, since it misses the events inside a
    copy between two.
    """
    # Its import traces all CUDA calls from here on.
    from torch.cuda._sanitizer import CUDASanitizerDispatchMode

    sanitizer = CUDASanitizerDispatchMode()
    prepare = streams.prepare_thread

    def watched(*arguments: Any) -> None:
        prepare(*arguments)
        sanitizer.__enter__()

    monkeypatch.setattr(streams, "prepare_thread", watched)
    engine = on_gpus(1)(3, "zb-h1", tied_head=True, num_layers=4)
    train(engine, range(2))
    assert engine.evaluate(batch(engine)) > 0


def test_the_doctor_measures_a_gpus_kernels() -> None:
    environment = check_kernels(prepare, "torch", "float32")
    assert environment["device_kind"] == "cuda"
