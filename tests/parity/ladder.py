"""The parity ladder: which runs are compared with the oracle and with each other, and how they are started.

The cases cover every value of p, m and dtype, every combination of head, norm and activation, all kinds of partition,
micro-batches with different numbers of tokens, or none, and of different sizes (8 sequences in 3 or 5). All train for 100
AdamW steps with clipping, warm-up and cosine. The cases of a framework share as few child processes as the framework
allows, since frameworks start slowly.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import common.probes
from common.probes import Expected, Run, read_probe
from common.runtime.job import Job, JobFile
from common.spec import RunConfig

ROOT = Path(__file__).parent.parent.parent
MODULE = {"torch": "torch_impl", "tensorflow": "tf_impl", "paddle": "paddle_impl"}
NOISE = 0.1

# Sequences end anywhere; of 13 per epoch the second mini-batch has 5: micro-batches of 2, 2, 1 and 0 sequences.
UNEVEN: dict[str, Any] = {"sequence_lengths": "random", "sequences_per_epoch": 13}


def config(
    framework: str, p: int, m: int, dtype: str, head: str, norm: str, activation: str, partition: str, dropout: float,
    schedule: str = "1f1b", steps: int = 100, chunks: int = 1, executor: str = "table", num_layers: int = 4,
    recompute: str = "none", uneven: bool = False, batch_size: int = 8,
) -> RunConfig:  # fmt: skip
    """One run, with one CPU thread per stage: a kernel splits its sums by the number of threads, so bits depend on it."""
    return RunConfig.model_validate(
        {
            "framework": framework, "stages": p, "chunks": chunks, "schedule": schedule, "partition": partition,
            "device": "cpu", "threads": p, "executor": executor, "recompute": recompute, **(UNEVEN if uneven else {}),
            "model": {
                "context_length": 12, "num_layers": num_layers, "d_model": 24, "num_heads": 2, "d_ff": 40, "norm": norm,
                "activation": activation, "tied_head": head == "tied", "dropout": dropout,
            },
            "train": {
                "steps": steps, "batch_size": batch_size, "micro_batches": m, "dtype": dtype, "clip_norm": 1.0,
                "learning_rate": 2e-3, "learning_rate_schedule": "cosine", "warmup_steps": min(10, steps),
            },
        }
    )  # fmt: skip


# p, m, dtype, head, norm, activation, partition, dropout, schedule
CASES: dict[str, tuple[Any, ...]] = {
    "1-1-float64": (1, 1, "float64", "untied", "pre", "gelu", "even", 0.0, "1f1b"),
    "1-4-float64": (1, 4, "float64", "tied", "post", "relu", "even", 0.1, "gpipe"),
    "2-1-float64": (2, 1, "float64", "tied", "pre", "relu", "even", 0.0, "naive"),
    "2-4-float64": (2, 4, "float64", "untied", "post", "gelu", "2", 0.1, "1f1b"),
    "4-1-float64": (4, 1, "float64", "untied", "post", "relu", "even", 0.1, "gpipe"),
    "4-4-float64": (4, 4, "float64", "tied", "pre", "gelu", "1,2,5", 0.0, "1f1b"),
    "1-1-float32": (1, 1, "float32", "tied", "post", "relu", "even", 0.1, "1f1b"),
    "1-4-float32": (1, 4, "float32", "untied", "pre", "gelu", "even", 0.0, "gpipe"),
    "2-1-float32": (2, 1, "float32", "tied", "post", "gelu", "4", 0.1, "1f1b"),
    "2-4-float32": (2, 4, "float32", "tied", "pre", "relu", "balanced", 0.0, "gpipe"),
    "4-1-float32": (4, 1, "float32", "tied", "pre", "gelu", "1,2,5", 0.0, "1f1b"),
    "4-4-float32": (4, 4, "float32", "untied", "pre", "relu", "even", 0.1, "1f1b"),
    "2-3-float64": (2, 3, "float64", "untied", "pre", "gelu", "even", 0.1, "zb-h1"),
    "4-5-float32": (4, 5, "float32", "tied", "post", "gelu", "even", 0.1, "1f1b"),
    "2-4-float64-uneven": (2, 4, "float64", "tied", "pre", "gelu", "even", 0.1, "1f1b"),
    "2-4-float32-uneven": (2, 4, "float32", "untied", "post", "gelu", "even", 0.0, "zb-h1"),
}


def case_config(framework: str, case: str) -> RunConfig:
    """The run of a ladder case."""
    return config(framework, *CASES[case], uneven=case.endswith("uneven"))


def run_probes(configs: dict[str, RunConfig], folder: Path, noise: float = NOISE) -> dict[str, Run]:
    """Runs all configurations of one framework in as few child processes as it allows. Raises RuntimeError.

    `noise` is added to all initial weights.
    """
    framework = next(iter(configs.values())).framework
    # Differs: a Paddle rank is a process and fleet starts once, so only runs of one p share processes.
    groups = {config.stages if framework == "paddle" else 0 for config in configs.values()}
    for group in sorted(groups):
        chosen = {n: c for n, c in configs.items() if framework != "paddle" or c.stages == group}
        _run_child(MODULE[framework], chosen, folder, group, noise)
    return {name: read_probe(folder / name) for name in configs}


def _run_child(module: str, configs: dict[str, RunConfig], folder: Path, group: int, noise: float) -> None:
    jobs = []
    for name, one in configs.items():
        (folder / name).mkdir(parents=True)
        jobs.append(Job(config=one, out=str(folder / name), kind="probe", noise=noise))
    path = folder / f"jobs-{group}.json"
    JobFile(jobs=tuple(jobs)).write(path)
    log = folder / f"log-{group}.txt"
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-m", module, str(path)],
            cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    if status:
        raise RuntimeError(f"{module} ended with {status}:\n{log.read_text()[-4000:]}")


def expected(one: RunConfig, noise: float = NOISE) -> Expected:
    """What the oracle says about a case."""
    return common.probes.expected(one, noise)


def first_different_bits(a: Run, b: Run, phases: Iterable[str] = ("forward", "backward", "trained")) -> str | None:
    """The first tensor or loss of which two runs do not hold the same bits, in words."""
    for phase in phases:
        theirs = {key._replace(stage=0): value for key, value in b.phase(phase).items()}
        for key, value in a.phase(phase).items():
            other = theirs[key._replace(stage=0)]
            if not np.array_equal(value, other):
                where = np.unravel_index(int(np.argmax(value != other)), value.shape)
                return f"{key}{[int(i) for i in where]}: {value[where]!r} against {other[where]!r}"
    for step, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)):
        if x != y:
            return f"step={step}/loss: {x!r} against {y!r}"
    return None
