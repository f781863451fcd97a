"""Run the drift zoo (`common.spec.habits`): every habit against its baseline.

First on the parity ladder, then over 500 steps. A habit should do three things: fail the ladder;
fail it first at the place it is known for; and cost some loss, or none. The cost is shown beside
the spread between seeds, since a smaller difference may be chance.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from common.harness.launch import IMPLEMENTATIONS, Implementation, run_jobs_in_worker, why_missing
from common.harness.probes import Run, compare_probe, expected, read_probe
from common.oracle.limits import Comparison, Difference
from common.report.names import framework_name
from common.report.zoo import AVERAGED_STEPS, CURVE_STRIDE, LADDER_STEPS, Row
from common.runtime.job import Job
from common.runtime.outcome import Outcome
from common.spec.habits import DRIFTS, Drift
from common.spec.mesh import Mesh
from common.spec.rules import has_cuda
from common.spec.run import RunConfig

NOISE = 0.1
"""As in the parity tests: no bias is 0 and no norm weight is 1, so that nothing can hide."""
PROCESS_WIDE = ("onednn",)
"""Habits that are settings of a whole process, and need a process of their own."""


def base_config(steps: int) -> RunConfig:
    """Return the parity tests' model: two blocks, stages and threads, four micro-batches."""
    model = {"context_length": 12, "num_layers": 2, "d_model": 24, "num_heads": 2, "d_ff": 40}
    train: dict[str, Any] = {"steps": steps, "batch_size": 8, "micro_batches": 4}
    train |= {"learning_rate": 2e-3, "learning_rate_schedule": "cosine"}
    train["warmup_steps"] = min(10, steps)
    run = {"stages": 2, "threads": 2, "device": "cpu"}
    return RunConfig.model_validate(run | {"model": model, "train": train})


def config_of(
    drift: Drift, framework: str, steps: int, on: bool = True, seed: int = 0
) -> RunConfig:
    """Return the run that shows `drift`, or its baseline."""
    base = base_config(steps).model_dump()
    model, train = base.pop("model") | dict(drift.model), base.pop("train") | dict(drift.train)
    train |= {"dtype": drift.dtype, "seed": seed}
    changes = {"framework": framework, "drift": drift.name if on else None}
    changes |= {"model": model, "train": train}
    return RunConfig.model_validate(base | dict(drift.run) | changes)


def run_zoo(
    folder: Path,
    runners: Sequence[tuple[str, str | None]],
    names: Sequence[str],
    steps: Sequence[int],
    seeds: int,
    timeout_seconds: float,
    on_step: Callable[[str, int], None] = lambda framework, done: None,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> tuple[list[Row], list[float], dict[str, str]]:
    """Run everything in `folder`; return rows, the spread's curve and all versions.

    `runners` are frameworks, each with the interpreter that is named for it, if any.
    """
    last = max(steps)

    def run_of(drift: Drift, runner: tuple[str, str | None], on: bool, seed: int = 0) -> RunConfig:
        framework, python = runner
        config = config_of(drift, framework, last, on, seed)
        return config.model_copy(update={"python": python})

    # Every habit in every framework that has it; of these, what this machine can run.
    wished = [drift for drift in DRIFTS if drift.name in names]
    chosen = [(drift, one) for drift in wished for one in runners if one[0] in drift.frameworks]
    on_cpu = [(drift, one) for drift, one in chosen if drift.run.get("device") != "cuda"]
    runnable = chosen if has_cuda() else on_cpu
    wanted = [run_of(drift, one, on) for drift, one in runnable for on in (False, True)]
    home = spread_runner(runners)

    def seeded(drift: Drift) -> list[RunConfig]:
        return [run_of(drift, home, on=False, seed=seed) for seed in range(seeds)]

    for drift, _ in runnable:
        wanted += seeded(drift)
    # Many habits have the same baseline; each distinct run is done once.
    each = list(dict.fromkeys(wanted))
    outcomes = run_all(each, folder, timeout_seconds, on_step, implementations)

    def spread_of(drift: Drift) -> list[Run]:
        return [run for config in seeded(drift) if isinstance(run := outcomes[config], Run)]

    rows = []
    for drift, one in chosen:
        without, with_it = (run_of(drift, one, on) for on in (False, True))
        if (drift, one) not in runnable:
            rows.append(_row(drift, without, "needs CUDA"))
            continue
        pair = outcomes[without], outcomes[with_it]
        rows.append(_judged(drift, without, *pair, spread_of(drift), steps))
    plain = [drift for drift, _ in runnable if not (drift.model or drift.train or drift.run)]
    curves = [strided(run.losses) for drift in plain[:1] for run in spread_of(drift)]
    spread = [statistics.stdev(values) for values in zip(*curves, strict=True) if len(curves) > 1]
    return rows, spread, versions_of(outcomes)


def spread_runner(runners: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """Return whose seeds give the spread: PyTorch's, which are the fastest, or the first one's."""
    return next((one for one in runners if one[0] == "torch"), runners[0])


def versions_of(outcomes: Mapping[RunConfig, Run | str]) -> dict[str, str]:
    """Return the version of every framework that ran, by its name in tables."""
    ran = {config: run for config, run in outcomes.items() if isinstance(run, Run)}
    return {
        framework_name(config): str(run.parts[0].environment["version"])
        for config, run in ran.items()
    }


def run_all(
    configs: Sequence[RunConfig],
    folder: Path,
    timeout_seconds: float,
    on_step: Callable[[str, int], None] = lambda framework, done: None,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
    noises: Mapping[RunConfig, float] = MappingProxyType({}),
) -> dict[RunConfig, Run | str]:
    """Run all probes, in few worker processes; for a failed one, say why. `noises`, or `NOISE`."""
    groups: dict[tuple[object, ...], list[RunConfig]] = {}
    for config in configs:
        # Differs: a Paddle rank is a process and fleet starts once, so runs of one mesh share them.
        mesh = Mesh.of(config) if config.framework == "paddle" else None
        alone = config.drift if config.drift in PROCESS_WIDE else None
        # TensorFlow's kernels are those of a process too.
        track = config.track if config.framework == "tensorflow" else None
        shared = (config.framework, config.python, mesh, config.device, alone, track)
        groups.setdefault(shared, []).append(config)
    outcomes: dict[RunConfig, Run | str] = {}
    done: dict[str, int] = {}
    for number, together in enumerate(groups.values()):
        framework, name = together[0].framework, framework_name(together[0])
        implementation = implementations[framework]
        if missing := why_missing(implementation, together[0].executor, together[0].python):
            outcomes |= dict.fromkeys(together, f"skipped: {missing}")
            continue
        home = folder / f"{number}-{framework}"
        outs = [str(home / str(number)) for number in range(len(together))]
        jobs = [
            Job(config=config, out=out, kind="probe", noise=noises.get(config, NOISE))
            for config, out in zip(together, outs, strict=True)
        ]

        def stepped(job: int, step: int, loss: float, name: str = name) -> None:
            done[name] = done.get(name, 0) + 1
            on_step(name, done[name])

        ended = run_jobs_in_worker(implementation.module, jobs, home, timeout_seconds, stepped)
        for config, job, outcome in zip(together, jobs, ended, strict=True):
            outcomes[config] = _read(outcome, Path(job.out), same_copies=config.drift is None)
    return outcomes


def _read(outcome: Outcome, folder: Path, same_copies: bool) -> Run | str:
    if outcome.status != "ok":
        return f"failed: {outcome.reason}"
    try:
        return read_probe(folder, same_copies)
    except ValueError as error:
        return f"failed: {error}"


# ------------------------------------------------------------------------------------------ judging


def first_failure(config: RunConfig, run: Run, steps: int = LADDER_STEPS) -> Difference | None:
    """Return the first rung of the ladder that fails, over the first `steps` steps."""
    return ladder(config, run, steps).first_failure


def ladder(config: RunConfig, run: Run, steps: int = LADDER_STEPS) -> Comparison:
    """Return all rungs, with the loss curve over the first `steps` steps."""
    steps = min(steps, config.train.steps)
    return compare_probe(run, expected(config, NOISE, steps), config.train.dtype)


def place_of(difference: Difference) -> str:
    """Return a unit for activations, "loss" for losses, else the parameter's name."""
    return difference.key.unit if difference.check == "activation" else difference.key.tensor


def _judged(
    drift: Drift,
    config: RunConfig,
    baseline: Run | str,
    drifted: Run | str,
    seeds: Sequence[Run],
    steps: Sequence[int],
) -> Row:
    for run in (baseline, drifted):
        if isinstance(run, str):
            return _row(drift, config, run)
    assert isinstance(baseline, Run) and isinstance(drifted, Run)
    row = _measured(drift, config, baseline, drifted, seeds, steps)
    wrong = first_failure(config, baseline, drift.ladder_steps)
    if wrong is not None:
        return row.model_copy(update={"verdict": "baseline differs", **_found(wrong)})
    # Judged as the run without the habit: the oracle has none.
    first = first_failure(config, drifted, drift.ladder_steps)
    if first is None:
        pairs = [(value, drifted.tensors[key]) for key, value in baseline.tensors.items()]
        differ = any(not np.array_equal(*pair) for pair in pairs)
        verdict = "within the limits" if drift.may_pass and differ else "not seen"
        return row.model_copy(update={"verdict": verdict})
    right = first.check == drift.check and fnmatch.fnmatchcase(place_of(first), drift.place)
    verdict = "as expected" if right else "elsewhere"
    return row.model_copy(update={"verdict": verdict, **_found(first)})


def _found(first: Difference) -> dict[str, object]:
    error = {"relative": first.relative, "limit": first.limit}
    return {"check": first.check, "place": place_of(first), **error}


def _row(drift: Drift, config: RunConfig, verdict: str) -> Row:
    return Row(
        name=drift.name,
        title=drift.title,
        framework=framework_name(config),
        default_of=drift.default_of,
        dtype=drift.dtype,
        verdict=verdict,
        expected_check=drift.check,
        expected_place=drift.place,
    )


def _measured(
    drift: Drift,
    config: RunConfig,
    baseline: Run,
    drifted: Run,
    seeds: Sequence[Run],
    steps: Sequence[int],
) -> Row:
    apart = [abs(a - b) for a, b in zip(drifted.losses, baseline.losses, strict=True)]
    found: dict[str, object] = {
        "cost": {n: mean_loss(drifted, n) - mean_loss(baseline, n) for n in steps},
        "held_out_cost": drifted.held_out_loss - baseline.held_out_loss,
        "curve": strided(apart),
    }
    if len(seeds) > 1:  # of one seed there is no spread
        spread = {n: statistics.stdev(mean_loss(run, n) for run in seeds) for n in steps}
        held_out = statistics.stdev(run.held_out_loss for run in seeds)
        found |= {"spread": spread, "held_out_spread": held_out}
    return _row(drift, config, "").model_copy(update=found)


def mean_loss(run: Run, steps: int) -> float:
    """Return the mean loss of the `AVERAGED_STEPS` steps up to `steps`."""
    return statistics.fmean(run.losses[max(0, steps - AVERAGED_STEPS) : steps])


def strided(values: Iterable[float]) -> list[float]:
    """Return the mean of every `CURVE_STRIDE` values, with six digits, for a picture."""
    listed = list(values)
    pieces = [listed[i : i + CURVE_STRIDE] for i in range(0, len(listed), CURVE_STRIDE)]
    return [float(f"{statistics.fmean(piece):.6g}") for piece in pieces]
