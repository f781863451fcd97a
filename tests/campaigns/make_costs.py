"""Remakes the table of docs/numerics.md that says what dropout, recomputation and bfloat16 cost.
Run it in the root.

    python -m tests.campaigns.make_costs          about six minutes

Each framework has one process, in which the variants take turns step by step: a machine that slows
down slows all of them. Two stages (Paddle, whose stages are processes: one), 1f1b, preset small.
The costs are of CPU time, which other work on the machine disturbs less than wall-clock time:
medians of every variant's step over the plain one's of the same turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from common.report.grid import Grid
from common.report.machine import this_machine
from common.runtime.job import Job
from common.runtime.training import starting_weights
from common.spec.data import load_corpus
from common.spec.run import FRAMEWORKS, RunConfig, preset

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
TURNS, UNTIMED = 14, 2
PLAIN = "none"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "dropout 0.1, shared masks": {"model": {"dropout": 0.1}},
    "dropout 0.1, the framework's own": {"model": {"dropout": 0.1, "dropout_masks": "native"}},
    "`--recompute full`": {"recompute": "full"},
    "`--recompute every-1`": {"recompute": "every-1"},
    "`--recompute except-last`": {"recompute": "except-last"},
    "`--dtype bfloat16`": {"train": {"dtype": "bfloat16"}},
}


def config_of(framework: str, changes: dict[str, Any]) -> RunConfig:
    base = preset("small").model_dump()
    sections = {name: base[name] | changes.get(name, {}) for name in ("model", "train")}
    stages = 1 if framework == "paddle" else 2
    run = {"framework": framework, "stages": stages, "threads": stages}
    run |= {"device": "cpu", "schedule": "1f1b"}
    return RunConfig.model_validate(base | run | changes | sections)


def measure(framework: str) -> dict[str, Any]:
    """In the framework's own process: by variant its cost and what it holds per stage, or why it
    was refused.
    """
    if framework == "torch":
        from torch_impl.devices import configure as configure_torch

        configure_torch(2, 2, "cpu")
        from torch_impl.engine import build_engine
    elif framework == "tensorflow":
        from tf_impl.devices import configure as configure_tensorflow

        configure_tensorflow(2, 2, "cpu")
        from tf_impl.engine import build_engine
    else:
        from common.runtime.world import World
        from common.spec.mesh import Mesh
        from paddle_impl.ranks import join_pipeline

        join_pipeline(World(0, ("127.0.0.1:0",)), Mesh(1, 1), "cpu")
        from paddle_impl.engine import build_engine
    engines: dict[str, Any] = {}
    found: dict[str, Any] = {}
    configs = {name: config_of(framework, changes) for name, changes in VARIANTS.items()}
    for name, config in configs.items():
        try:
            engines[name] = build_engine(config)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        engines[name].reset(starting_weights(Job(config=config, out="")))
    corpus = load_corpus(config_of(framework, {}))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(TURNS):
        for name, engine in engines.items():
            batch = corpus.training_batch(configs[name], step)
            began = time.process_time()
            engine.forward_backward(batch)
            engine.apply_gradients(step)
            seconds[name].append(time.process_time() - began)
    plain = seconds[PLAIN][UNTIMED:]
    for name, engine in engines.items():
        ratios = [one / other for one, other in zip(seconds[name][UNTIMED:], plain, strict=True)]
        held = list(engine.held_bytes_peak().values())
        found[name] = {"cost": median(ratios), "held_bytes": held}
        engine.close()
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    def cost(each: dict[str, Any]) -> str:
        return "refused: no kernels on CPU" if "refused" in each else f"{each['cost']:.2f}"

    def held(each: dict[str, Any]) -> str:
        return "" if "refused" in each else ", ".join(map(_megabytes, each["held_bytes"])) + " MB"

    rows = []
    for name in VARIANTS:
        if name != PLAIN:
            rows.append([name, *(cost(found[framework][name]) for framework in FRAMEWORKS)])
    for name, changes in VARIANTS.items():
        if "model" not in changes:
            sizes = [held(found[framework][name]) for framework in FRAMEWORKS]
            rows.append([f"held, {name}", *sizes])
    titles = ("", "PyTorch", "TensorFlow", "Paddle")
    return Grid(titles, rows, titles).markdown().strip()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g}" if size >= 1000 else "0"


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] not in FRAMEWORKS:
            raise SystemExit(f"{sys.argv[1]}: expected nothing, or one of {', '.join(FRAMEWORKS)}")
        print(json.dumps(measure(sys.argv[1])))
        return
    # Not in the frameworks' processes, which it would make larger.
    from tests.campaigns.make_schedules import fill

    found = {}
    for framework in FRAMEWORKS:
        command = [sys.executable, "-m", "tests.campaigns.make_costs", framework]
        worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[framework] = json.loads(worker.stdout.splitlines()[-1])
        print(framework, found[framework], flush=True)
    fill("costs", f"{table(found)}\n\nMeasured on {this_machine().one_line}.", PAGE)


if __name__ == "__main__":
    main()
