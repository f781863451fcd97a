"""Measure what every kind of unit takes in one framework, as it takes it in a pipeline.

The profile is an ordinary run on as many devices as the plan will have, so that stages disturb one
another as they will then. A device has about as many blocks as the plan's, once in chunks and once
in one piece:

    2 devices    embedding │ block.0 │ block.1-2 │ block.3-4 │ block.5 │ head
                 embedding, block.0-2 │ block.3-5, head
    1 device     embedding │ block.0 │ block.1-5 │ head                              6 blocks
                 embedding, block.0-5, head

A block's time is the slope over the number of blocks in a chunk, an action's own what is left at
none. In TensorFlow (preset `small`, four sequences) B of one, two and three blocks took 14.2, 27.7
and 42.2 ms: 14.0 for each block and 0.1 for the action.

With fewer blocks on a device more stays in the caches: of `small` on one device, a block's BW in
Paddle took 24 ms among 4 and 27 among 6. It does not grow for ever: an F in PyTorch took 4.9 ms a
block among 8 and among 12. So a deep model is cut to eight.

Every micro-batch size runs twice each way: with BW in one piece, and with B and W apart. The
mini-batch is that of the run, so that as much is held and as many devices wait as will then.

On a CPU the stages share the cores: the fewer there are, the more threads each has. So fewer
devices are measured too, for every number of threads (`numbers_of_devices`).

A machine gets faster and slower within minutes. So the sizes are gone through there in chunks and
back in one piece, and every number of devices is met once early and once late:

    2 devices there    1 device there    1 device back    2 devices back
    1 2 4 8 16         1 2 4 8 16        16 8 4 2 1       16 8 4 2 1        sequences
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from common.harness.launch import IMPLEMENTATIONS, run_jobs_in_worker
from common.harness.peak import Probe, peak_of
from common.io.bounded import read_text
from common.io.edges import write_file
from common.io.usage import UsageError
from common.report.machine import this_machine
from common.report.result import measured
from common.report.timing import Timing
from common.runtime.cpus import threads_per_stage, usable_cpus
from common.runtime.job import Job
from common.schedule.action import Op
from common.spec.memory import Memory
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from common.spec.unit_times import ACTION, KINDS, UnitTimes

MOST_BLOCKS = 8
"""On a device."""
STEPS, UNTIMED_STEPS = 7, 2
IN_CHUNKS, IN_ONE_PIECE = ("interleaved", "interleaved-zb"), ("1f1b", "zb-h1")
"""Schedules with BW as one action, and with B and W."""


class Profile(BaseModel):
    """Unit times, with what they hold for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2]
    """Those before 2 had none: all devices' times alone, of another mini-batch than the run's."""
    machine: str
    version: str
    """Of the framework."""
    devices: int
    config: RunConfig
    """The run whose units were measured; its layers do not matter."""
    times: UnitTimes

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read a profile. Raises UsageError for any other file, or another schema version."""
        try:
            return cls.model_validate_json(read_text(path, 2**24))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; expected a file") from None
        except ValidationError as error:
            is_old = all(each["loc"] == ("schema_version",) for each in error.errors())
            what = "a profile of another version of triptych" if is_old else "not a profile"
            raise UsageError(f"{path}: {what}; expected one by plan --profile") from None

    def write(self, path: Path) -> None:
        """Write the profile as JSON."""
        write_file(path, self.model_dump_json(indent=1) + "\n")

    def difference(self, config: RunConfig, devices: int) -> str | None:
        """Say in what the profile is of another run, None if it is not."""
        if devices != self.devices:
            return f"{self.devices} devices; expected {devices}"
        mine, theirs = _what_counts(self.config), _what_counts(config)
        return next(
            (
                f"{name} = {mine[name]}; expected {theirs[name]}"
                for name in mine
                if mine[name] != theirs[name]
            ),
            None,
        )


def _what_counts(config: RunConfig) -> dict[str, object]:
    """Return what decides a unit's time."""
    model = config.model.model_dump(exclude={"num_layers"})
    run = config.model_dump(include={"framework", "track", "device", "threads"})
    return {**run, **model, "dtype": config.train.dtype, "optimizer": config.train.optimizer}


def micro_batch_sizes(batch_size: int) -> list[int]:
    """Return the sizes to measure: powers of two up to the mini-batch, eight at most."""
    return [2**k for k in range(batch_size.bit_length())][-8:]


def numbers_of_devices(devices: int, threads: int | None) -> list[int]:
    """Return how many stages to measure on a CPU, the largest first: one number of them for every
    number of threads that a stage may have, and each that leaves a thread no core of its own.

        4 devices on 8 cores    4 (2 threads each; so have 3)   2 (4)   1 (8)
        4 devices on 2 cores    4 (half a core each)   3 (two thirds)   2 (1)   1 (2)
    """
    found: dict[tuple[int, float], int] = {}
    for stages in range(devices, 0, -1):
        each = threads_per_stage(stages, threads)
        found.setdefault((each, max(1.0, stages * each / usable_cpus())), stages)
    return list(found.values())


def profile_config(config: RunConfig, devices: int, schedule: str, sequences: int) -> RunConfig:
    """Return the run that measures micro-batches of so many sequences."""
    # At least one and two: time of a block is a difference.
    of_plan = math.ceil(config.model.num_layers / devices)
    longest = max(2, min(of_plan, MOST_BLOCKS) - 1)
    blocks = [1, 1, longest, 1] if devices == 1 else [1, longest, 1]
    if schedule in IN_ONE_PIECE:
        blocks = [sum(blocks)]
    # The embedding and the head stand in for the first block and the last.
    parts = [number for number in blocks for _ in range(devices)]
    count = max(1, config.train.batch_size // sequences)
    train = {
        "batch_size": sequences * count,
        "micro_batches": count,
        "steps": STEPS,
        "warmup_steps": 0,
    }
    run = {
        "stages": devices,
        # A unit's times are those of a whole one: the plan divides them among shards.
        "replicas": 1,
        "tensor_parallel": 1,
        "vocab_parallel": False,
        "chunks": len(blocks),
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
    with_fewer: bool = True,
    on_worker: Callable[[Sequence[RunConfig]], None] = lambda runs: None,
) -> Profile:
    """Measure in worker processes, two for each number of devices; without `with_fewer` all of
    them alone. `on_worker(runs)` is called ahead of each. Raises UsageError where a run fails."""
    sizes = micro_batch_sizes(config.train.batch_size)

    def measure(n: int, schedules: Sequence[str], order: int) -> list[tuple[RunConfig, Any]]:
        runs = [profile_config(config, n, schedule, b) for b in sizes for schedule in schedules]
        on_worker(runs[::order])
        return _run_all(runs[::order])

    found = {devices: measure(devices, IN_CHUNKS, 1)}
    said = found[devices][0][1]["environment"]
    shared = with_fewer and said["device_kind"] == "cpu"
    numbers = numbers_of_devices(devices, config.threads) if shared else [devices]
    for n in numbers[1:]:
        found[n] = measure(n, IN_CHUNKS, 1)
    for n in reversed(numbers):
        found[n] += measure(n, IN_ONE_PIECE, -1)
    machine = this_machine().one_line
    times = {
        n: unit_times(
            [(run, result["timing"]) for run, result in measurements],
            f"measured with {config.framework} {said['version']} on {n} "
            f"device{'s' * (n > 1)} of {machine}",
        ).model_copy(update={"peak_flops_per_device": _peak(*measurements[0])})
        for n, measurements in found.items()
    }
    whole = times.pop(devices)
    return Profile(
        schema_version=2,
        machine=machine,
        version=str(said["version"]),
        devices=devices,
        config=config,
        times=whole.model_copy(update={"fewer": times}),
    )


def _run_all(runs: Sequence[RunConfig]) -> list[tuple[RunConfig, Any]]:
    """Run all in one worker process; return each with its result."""
    with tempfile.TemporaryDirectory(prefix="triptych-") as name:
        folder = Path(name)
        jobs = [Job(config=run, out=str(folder / str(i))) for i, run in enumerate(runs)]
        module = IMPLEMENTATIONS[runs[0].framework].module
        outcomes = run_jobs_in_worker(module, jobs, folder)
        for run, outcome in zip(runs, outcomes, strict=True):
            if outcome.status != "ok":
                raise UsageError(
                    f"--profile: {run.framework}, {run.schedule}, "
                    f"{run.train.batch_size} sequences: "
                    f"{outcome.reason}"
                )
        return [
            (run, measured(outcome, run, UNTIMED_STEPS))
            for run, outcome in zip(runs, outcomes, strict=True)
        ]


def _peak(run: RunConfig, result: Mapping[str, Any]) -> float | None:
    """Return what one stage could multiply: its card, or its share of a card or of the CPU."""
    said = result["environment"]
    probe = Probe.of_run(run, said)
    if probe is None:
        return None
    together = peak_of(probe, probe.measure(), said).measured_flops_per_second
    return together and together / run.stages


def unit_times(timings: Iterable[tuple[RunConfig, Timing]], source: str) -> UnitTimes:
    """Fit unit times to the timings of `profile_config`'s runs: by least squares, none below zero,
    for every operation and micro-batch size."""
    from scipy.optimize import nnls  # here: a plan by counted FLOPs can do without

    names = (*KINDS, ACTION)
    # For every part: how often it has each name (an action once), and the seconds it took.
    found: dict[tuple[Op, int], list[tuple[list[int], float]]] = {}
    hops, receives, optimizer = [], [], []
    for run, timing in timings:
        parts = [[unit.partition(".")[0] for unit in part] for part in plan_partition(run).parts]
        sequences = run.micro_batch_sizes[0]
        for cost in timing.costs:
            counts = [[*parts[cost.virtual_stage], ACTION].count(name) for name in names]
            found.setdefault((Op(cost.op), sequences), []).append((counts, cost.seconds))
        hops.append(timing.hop_seconds)
        receives.append(timing.receive_seconds)
        rest = timing.measured_step_seconds - timing.measured_pipeline_seconds
        optimizer.append(rest / _most_parameters(run))
    seconds: dict[str, dict[str, dict[int, float]]] = {
        name: {op.value: {} for op in Op} for name in names
    }
    for (op, b), rows in found.items():
        has = np.array([counts for counts, _ in rows])  # (parts, kinds)
        took = np.array([each for _, each in rows])  # (parts,)
        # Long actions differ by more than short ones, but by less than in proportion.
        weights = 1 / np.sqrt(np.maximum(took, 1e-9))  # (parts,)
        nearest, _ = nnls(has * weights[:, None], took * weights)
        for name, value in zip(names, nearest.tolist(), strict=True):
            seconds[name][op.value][b] = value
    return UnitTimes(
        source=source,
        seconds=seconds,
        # A run in which no message was waited for, or none was there before, has 0.
        hop_seconds=statistics.median([each for each in hops if each] or [0.0]),
        receive_seconds=statistics.median([each for each in receives if each] or [0.0]),
        optimizer_seconds_per_parameter=statistics.median(optimizer),
    )


def _most_parameters(run: RunConfig) -> int:
    return max(each.parameters for each in Memory.of_run(run))
