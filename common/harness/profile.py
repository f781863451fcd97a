"""Measure what every kind of unit takes in one framework, as it takes it in a pipeline.

The profile is an ordinary run of a short model on as many devices as the plan will have, so that
stages disturb one another as they will then. Its chunks have one block or three:

    2 devices, 3 chunks     embedding │ block.0 │ block.1-3 │ block.4-6 │ block.7 │ head

Two more blocks take twice a block's time; what is left of one alone is an action's own. Every
micro-batch size runs twice: with BW in one piece, and with B and W apart.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from common.harness.launch import IMPLEMENTATIONS, Implementation, run_jobs_in_worker
from common.harness.peak import Probe, peak_of
from common.io.usage import UsageError
from common.report.machine import this_machine
from common.report.result import measured
from common.report.timing import Timing
from common.runtime.job import Job
from common.schedule.action import Op
from common.spec.memory import Memory
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from common.spec.unit_times import ACTION, KINDS, UnitTimes

CHUNK_BLOCKS = (1, 3, 1)
"""Blocks of a part, by chunk; the embedding and the head stand in for the first and the last."""
MICRO_BATCHES = 8
STEPS, UNTIMED_STEPS = 7, 2
TOGETHER, APART = "interleaved", "interleaved-zb"
"""With BW as one action; with B and W."""


class Profile(BaseModel):
    """Unit times, with what they hold for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    version: str
    """Of the framework."""
    devices: int
    config: RunConfig
    """The run whose units were measured; its layers and mini-batch do not matter."""
    times: UnitTimes

    def difference(self, config: RunConfig, devices: int) -> str | None:
        """Say in what the profile is of another run, None if it is not."""
        if devices != self.devices:
            return f"{self.devices} devices"
        mine, theirs = _what_counts(self.config), _what_counts(config)
        return next((f"{name} = {mine[name]}" for name in mine if mine[name] != theirs[name]), None)


def _what_counts(config: RunConfig) -> dict[str, object]:
    """Return what decides a unit's time."""
    model = config.model.model_dump(exclude={"num_layers"})
    run = config.model_dump(include={"framework", "track", "device", "threads"})
    return {**run, **model, "dtype": config.train.dtype, "optimizer": config.train.optimizer}


def micro_batch_sizes(batch_size: int) -> list[int]:
    """Return the sizes to measure: powers of two up to the mini-batch, eight at most."""
    return [2**k for k in range(batch_size.bit_length())][-8:]


def profile_config(config: RunConfig, devices: int, schedule: str, sequences: int) -> RunConfig:
    """Return the run that measures micro-batches of so many sequences."""
    parts = [number for number in CHUNK_BLOCKS for _ in range(devices)]
    parts[0] = parts[-1] = 1
    train = {
        "batch_size": sequences * MICRO_BATCHES,
        "micro_batches": MICRO_BATCHES,
        "steps": STEPS,
        "warmup_steps": 0,
    }
    run = {
        "stages": devices,
        "chunks": len(CHUNK_BLOCKS),
        "schedule": schedule,
        "partition": tuple(itertools.accumulate(parts[:-1])),
        "recompute": "none",
        "model": config.model.model_copy(update={"num_layers": sum(parts) - 2}),
        "train": config.train.model_copy(update=train),
    }
    return RunConfig.model_validate(dict(config) | run)


def profile(
    config: RunConfig,
    devices: int,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
    on_job: Callable[[int, int], None] = lambda done, of: None,
) -> Profile:
    """Measure in a worker process. Raises UsageError where that fails."""
    runs = [
        profile_config(config, devices, schedule, sequences)
        for sequences in micro_batch_sizes(config.train.batch_size)
        for schedule in (TOGETHER, APART)
    ]
    with tempfile.TemporaryDirectory(prefix="triptych-") as name:
        folder = Path(name)
        jobs = [Job(config=run, out=str(folder / str(i))) for i, run in enumerate(runs)]
        outcomes = run_jobs_in_worker(
            implementations[config.framework].module,
            jobs,
            folder,
            on_step=lambda job, step, loss: on_job(job, len(jobs)),
        )
        for run, outcome in zip(runs, outcomes, strict=True):
            if outcome.status != "ok":
                raise UsageError(
                    f"--profile: {run.framework}, {run.schedule}, "
                    f"{run.train.batch_size} sequences: "
                    f"{outcome.reason}"
                )
        results = [
            measured(outcome, run, UNTIMED_STEPS)
            for run, outcome in zip(runs, outcomes, strict=True)
        ]
    version, machine = str(results[0]["environment"]["version"]), this_machine().one_line
    times = unit_times(
        [(run, result["timing"]) for run, result in zip(runs, results, strict=True)],
        f"measured with {config.framework} {version} on {devices} devices of {machine}",
    )
    times = times.model_copy(update={"peak_flops_per_device": _peak(results[0], runs[0])})
    return Profile(machine=machine, version=version, devices=devices, config=config, times=times)


def _peak(result: Mapping[str, Any], run: RunConfig) -> float | None:
    """Return what one stage could multiply: its card, or its share of a card or of the CPU."""
    said = result["environment"]
    probe = Probe.of_run(run, said)
    if probe is None:
        return None
    together = peak_of(probe, probe.measure(), said).measured_flops_per_second
    return together and together / run.stages


def unit_times(timings: Iterable[tuple[RunConfig, Timing]], source: str) -> UnitTimes:
    """Put the timings of `profile_config`'s runs together; of equal parts, the median counts."""
    found: dict[tuple[str, int], dict[Op, dict[int, list[float]]]] = {}
    hops, optimizer = [], []
    for run, timing in timings:
        parts = plan_partition(run).parts
        sequences = run.micro_batch_sizes[0]
        for cost in timing.costs:
            part = parts[cost.virtual_stage]
            of_part = found.setdefault((part[0].partition(".")[0], len(part)), {})
            of_part.setdefault(Op(cost.op), {}).setdefault(sequences, []).append(cost.seconds)
        hops.append(timing.hop_seconds)
        rest = timing.measured_step_seconds - timing.measured_pipeline_seconds
        optimizer.append(rest / _most_parameters(run))
    seconds: dict[str, dict[str, dict[int, float]]] = {
        kind: {op.value: {} for op in Op} for kind in (*KINDS, ACTION)
    }
    most = max(CHUNK_BLOCKS)
    for op, sizes in found["block", most].items():
        for b in sizes:

            def seen(kind: str, units: int, op: Op = op, b: int = b) -> float:
                return statistics.median(found[kind, units][op][b])

            several = seen("block", most)
            # One device has no part of one block: nothing is known of its actions.
            one = seen("block", 1) if ("block", 1) in found else several / most
            block = min(max(0.0, (several - one) / (most - 1)), one)
            times = {"block": block, ACTION: one - block}
            for kind in ("embedding", "head"):
                times[kind] = max(0.0, seen(kind, 1) - times[ACTION])
            for kind, value in times.items():
                seconds[kind][op.value][b] = value
    return UnitTimes(
        source=source,
        seconds=seconds,
        hop_seconds=statistics.median(hops),
        optimizer_seconds_per_parameter=statistics.median(optimizer),
    )


def _most_parameters(run: RunConfig) -> int:
    return max(each.parameters for each in Memory.of_run(run))
