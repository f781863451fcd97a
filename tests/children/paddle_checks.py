"""What only Paddle's own processes can see: fleet's order of work, ranks that die, the split backward. Prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from paddle.distributed.fleet.meta_parallel import PipelineParallel
from safetensors.numpy import load_file

from common import dropout as reference
from common.data import load_corpus
from common.runtime.job import Job, JobFile, Part
from common.schedule.generators import make_schedule
from common.spec import PRESETS, RunConfig, TrainSpec, TransformerSpec
from common.weights import initial_weights
from paddle_impl import devices
from paddle_impl.dropout import DropoutContext, keep_mask
from paddle_impl.engine import build_engine

ROOT = Path(__file__).parent.parent.parent
SPLIT = "0: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3\n"


def config(stages: int, train: Any = None, model: Any = None, **run: Any) -> RunConfig:
    """A small run, with one thread per stage."""
    return RunConfig(
        framework="paddle",
        stages=stages,
        threads=stages,
        device="cpu",
        model=TransformerSpec(**PRESETS["tiny"]["model"] | (model or {})),
        train=TrainSpec(**PRESETS["tiny"]["train"] | (train or {})),
        **run,
    )


def train(run: RunConfig) -> tuple[list[Any], list[int]]:
    """Losses, gradients and weights of three steps in this process, and how often each unit's forward ran."""
    engine = build_engine(run)
    engine.reset(initial_weights(run.model, 0, run.train.dtype))
    calls = [0] * len(engine.stage.chunks[0])

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, (_, unit) in enumerate(engine.stage.chunks[0]):
        unit.register_forward_post_hook(count(index))
    corpus = load_corpus(run)
    seen: list[Any] = []
    for step in range(3):
        batch = corpus.batch(step, 0, run.train.batch_size, run.model.context_length)
        seen += [np.array(engine.forward_backward(batch)), *engine.gradients().values()]
        engine.apply_gradients(step)
    seen += engine.weights().values()
    engine.close()
    return seen, calls


def split_backward() -> dict[str, Any]:
    """A schedule of F, B and W against one of F and BW, with every kind of head and dtype."""
    same, all_calls = [], []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as table:
        table.write(SPLIT)
        table.flush()
        for dtype in ("float32", "float64"):
            for tied in (False, True):
                options = {"train": {"dtype": dtype}, "model": {"tied_head": tied, "dropout": 0.1}}
                merged, merged_calls = train(config(1, **options))
                split, split_calls = train(config(1, schedule=f"file:{table.name}", **options))
                same.append(all(np.array_equal(a, b) for a, b in zip(merged, split, strict=True)))
                all_calls += [*merged_calls, *split_calls]
    return {"bitwise": same, "forward_calls": sorted(set(all_calls)), "expected_calls": [3 * 4]}


def dropout_bits() -> bool:
    samples = np.array([3, 0, 7, 200_000])
    key = reference.step_key(5, 11)
    context = DropoutContext(step_key=key, samples=samples)
    return all(
        np.array_equal(
            keep_mask(context, site, shape, probability).numpy(),
            reference.keep_mask(key, site, samples, shape, probability),
        )
        for site in (0, 6, 1021)
        for shape in ((4, 16, 32), (4, 2, 16, 16), (4, 1))
        for probability in (0.1, 0.5, 0.999)
    )


def fleet_order() -> list[str]:
    """The stages whose line in our 1f1b is not what fleet's static scheduler prints."""
    pipeline = build_engine(config(1, executor="native")).pipeline
    different = []
    for p, m in ((1, 3), (2, 1), (2, 4), (3, 5), (4, 2), (4, 8)):
        schedule = make_schedule("1f1b", p, m)
        for stage in range(p):
            pipeline.num_stages, pipeline.stage_id, pipeline.accumulate_steps = p, stage, m
            theirs = PipelineParallel.forward_backward_pipeline(pipeline, None, static_scheduler=True)
            ours = "".join(f"{action};" for action in schedule.devices[stage]).lower().replace("bw", "b")
            if theirs != ours:
                different.append(f"p={p} m={m} stage={stage}: {theirs} instead of {ours}")
    return different


def start(folder: Path, *jobs: RunConfig) -> tuple[list[Path], subprocess.Popen[str]]:
    """Starts `python -m paddle_impl` over the jobs. Returns their folders and the process."""
    outs = [folder / str(index) for index in range(len(jobs))]
    for out in outs:
        out.mkdir(exist_ok=True)
    JobFile(jobs=tuple(Job(config=c, out=str(o)) for c, o in zip(jobs, outs, strict=True))).write(folder / "jobs.json")
    command = [sys.executable, "-m", "paddle_impl", str(folder / "jobs.json")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return outs, child


def native_against_table() -> dict[str, Any]:
    """Fleet's own 1F1B and our executor over two ranks: losses, norms and gradients to the bit, and what ran when."""
    options: dict[str, Any] = {"train": {"dtype": "float64"}, "model": {"tied_head": True, "dropout": 0.1}}
    with tempfile.TemporaryDirectory() as name:
        outs, child = start(Path(name), config(2, **options), config(2, executor="native", **options))
        log, _ = child.communicate(timeout=120)
        if child.returncode:
            return {"log": log}
        seen: list[Any] = []
        for out in outs:
            parts = [Part.model_validate_json((out / f"part-{rank}.json").read_text()) for rank in range(2)]
            numbers = [(step.loss, step.gradient_norm) for part in parts for step in part.steps]
            arrays = [load_file(out / f"part-{rank}.safetensors") for rank in range(2)]
            order = [[e.action for e in part.steps[-1].events[rank]] for rank, part in enumerate(parts)]
            seen.append((numbers, arrays, order))
    (numbers, arrays, order), (native_numbers, native_arrays, native_order) = seen
    schedule = make_schedule("1f1b", 2, 4)
    planned = [[str(action) for action in row] for row in schedule.devices]
    return {
        "numbers_bitwise": numbers == native_numbers,
        "gradients_bitwise": all(
            a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
            for a, b in zip(arrays, native_arrays, strict=True)
        ),
        "tensors": [len(part) for part in arrays],
        "events_are_schedule": order == planned and native_order == planned,
    }


def killed_rank() -> dict[str, Any]:
    """One of two ranks is killed in the middle of a long run."""
    with tempfile.TemporaryDirectory() as name:
        outs, child = start(Path(name), config(2, train={"steps": 100_000}))
        deadline = time.monotonic() + 60
        while not (outs[0] / "progress.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = psutil.Process(child.pid).children()
        ranks[1].kill()
        began = time.monotonic()
        log, _ = child.communicate(timeout=60)
        return {
            "ranks": len(ranks),
            "seconds": time.monotonic() - began,
            "status": child.returncode,
            "log": log.splitlines()[-1],
            "told": {path.name: path.read_text().splitlines()[-1] for path in sorted(outs[0].glob("failed-*"))},
            "left": [process.pid for process in ranks if process.is_running()],
        }


def killed_parent() -> dict[str, Any]:
    """The process that started the ranks is killed without a chance to end them."""
    with tempfile.TemporaryDirectory() as name:
        outs, child = start(Path(name), config(2, train={"steps": 100_000}))
        deadline = time.monotonic() + 60
        while not (outs[0] / "progress.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = psutil.Process(child.pid).children()
        child.kill()
        child.communicate(timeout=60)
        _, left = psutil.wait_procs(ranks, timeout=10)
        return {"ranks": len(ranks), "left": [process.pid for process in left if process.status() != "zombie"]}


def failed_job() -> dict[str, Any]:
    """The first of two jobs fails on one rank only; the second must still run."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "0" / "part-1.json").mkdir(parents=True)  # rank 1 cannot write its result
        began = time.monotonic()
        outs, child = start(Path(name), config(2), config(2))
        child.communicate(timeout=120)
        return {
            "status": child.returncode,
            "seconds": time.monotonic() - began,
            "failed": [path.name for path in sorted(outs[0].glob("failed-*"))],
            "reason": (outs[0] / "failed-1.txt").read_text().splitlines()[-1].split(":")[0],
            "second": [path.name for path in sorted(outs[1].glob("part-*.json"))],
        }


if __name__ == "__main__":
    devices.configure(1, 1, "cpu")
    in_processes = (native_against_table, killed_rank, killed_parent, failed_job)
    found = {check.__name__: check() for check in in_processes}  # before Paddle starts threads in this one
    devices.join_pipeline(0, ["127.0.0.1:0"], "cpu")
    found |= {check.__name__: check() for check in (split_backward, dropout_bits, fleet_order)}
    print(json.dumps(found))
