"""`result.json`: everything known about one run, with a schema version."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.io.bounded import read_text
from common.io.edges import OsText, write_file
from common.io.usage import UsageError
from common.report.machine import Machine
from common.report.timing import Timing, executed_schedule, measure
from common.runtime.job import EventRecord
from common.runtime.outcome import Outcome, Status
from common.schedule.action import ScheduleError
from common.spec.efficiency import model_flops_per_token
from common.spec.partition import schedule_of
from common.spec.run import RunConfig

IS_ORACLE = "this is the oracle"

MAX_RESULT_BYTES = 256 * 2**20
SCHEMA_VERSION = 4
"""2 added the timing, the held activations, the untimed steps, and the events of the median step in
place of the last. 3 added the verdict "not comparable", errors in bfloat16, and recomputation,
ragged sequences and drift. 4 added the peak.
"""


class ResultError(UsageError):
    """A result file that cannot be read."""


class Step(BaseModel):
    """One optimizer step of the whole pipeline."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    step: int
    loss: float
    gradient_norm: float
    seconds: float
    """The longest over the processes of the run."""


class Parity(BaseModel):
    """The verdict of the comparison with the oracle."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    status: Literal["pass", "FAIL", "not checked", "not comparable"] = "not checked"
    reason: str = ""
    """The first tensor that differs, or why there was no comparison."""
    tensors: int = 0
    """How many were compared."""
    margins: dict[str, float] = {}
    """The worst observed error over its limit, per check; below 1 passes."""
    errors: dict[str, float] = {}
    """In bfloat16: the relative errors per check, to be judged beside other frameworks'."""
    curve_floor: float = 0.0
    """In bfloat16: the loss curve's error from rounded weights alone, in any framework."""


class Peak(BaseModel):
    """What all devices of a run together could multiply; None where nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured_flops_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Large matrix products in the run's dtype, between the runs of the same benchmark."""
    published_flops_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The cards' data sheets."""
    measured_by: str = ""


class RunResult(BaseModel):
    """One run of one framework; None or empty if not measured. Failed runs are results too."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    status: Status
    reason: str = ""
    log: OsText | None = None
    """Path of the worker's log or traceback, relative to the folder of the whole benchmark."""
    preset: str
    row: int = 0
    """Place in the table of its benchmark, from 0."""
    repeat: int = 0
    config: RunConfig
    environment: dict[str, Any] = {}
    """Versions, devices, threads and flags as the worker read them back."""
    steps: tuple[Step, ...] = ()
    held_out_loss: float | None = None
    build_seconds: float | None = None
    """Building the model, before the first step."""
    wall_seconds: float = 0.0
    """The whole worker process, imports included."""
    peak_memory_bytes: dict[int, int] = {}
    """By device on CUDA; by the first device of each process on the CPU. Of line l
    (`common.spec.mesh`), device s has the number l x stages + s.
    """
    actions: dict[int, str] = {}
    """What each device did in one step, in the text form of schedules."""
    untimed_steps: int = 2
    """The first steps, which no statistic includes: they trace, compile and fill caches."""
    timing: Timing | None = None
    """Measured against simulated; None if the executor does not record its actions."""
    median_step_events: dict[int, list[EventRecord]] = {}
    """The actions of the step that `timing` names, with their times."""
    held_activation_peak_bytes: dict[int, int] = {}
    """By device: the most bytes of activations held for a backward, counted by tensors."""
    in_flight_peak: dict[int, int] = {}
    """By device: the most chunks of micro-batches held at once, as the executor counted them."""
    peak: Peak | None = None
    """What its devices could do, beside `model_flops_per_second`."""
    corpus_digest: str | None = None
    corpus_bytes: int | None = None
    tokenizer_digest: str | None = None
    """SHA-256 of tokenizer.json; empty for bytes, None if unknown."""
    parity: Parity = Parity()
    resumed_from: OsText | None = None
    """The checkpoint that the run continued from; its first step is that of `steps[0]`."""
    restarts: tuple[str, ...] = ()
    """A line for every worker that died and was followed by another; `steps` are of all of them."""
    command: OsText
    machine: Machine
    git_commit: str | None = None
    started: str = Field("", description="ISO 8601, UTC")

    @property
    def is_oracle(self) -> bool:
        return self.parity.reason == IS_ORACLE

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context_length

    @property
    def first_step_seconds(self) -> float | None:
        """Apart from the others: it traces, compiles and fills caches."""
        return self.steps[0].seconds if self.steps else None

    @property
    def steady_seconds(self) -> tuple[float, ...]:
        """Seconds of every timed step."""
        return tuple(step.seconds for step in self.steps[self.untimed_steps :])

    @property
    def tokens_per_second(self) -> float | None:
        """Trained tokens over the median time of the timed steps."""
        if self.steady_seconds:
            return self.tokens_per_step / statistics.median(self.steady_seconds)
        return None

    @property
    def model_flops_per_second(self) -> float | None:
        """Over all devices, without recomputation (`common.spec.efficiency`)."""
        speed = self.tokens_per_second
        return None if speed is None else speed * model_flops_per_token(self.config)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the share of the measured peak."""
        return self._share(self.peak.measured_flops_per_second if self.peak else None)

    @property
    def published_mfu(self) -> float | None:
        """The same of the cards' data sheets."""
        return self._share(self.peak.published_flops_per_second if self.peak else None)

    def _share(self, peak: float | None) -> float | None:
        done = self.model_flops_per_second
        return None if peak is None or done is None else done / peak

    @property
    def final_loss(self) -> float | None:
        return self.steps[-1].loss if self.steps else None

    @property
    def version(self) -> str:
        return str(self.environment.get("version", ""))

    @property
    def device(self) -> str:
        """What computed, as the worker processes said: cpu, or the card's name, all of them where
        they differ; empty for a run that did not get so far.
        """
        names, _ = cards_of(self.environment)
        return ", ".join(names) or ("cpu" if self.environment else "")

    @property
    def gpus(self) -> int:
        """Cards that the stages lie on; 0 on the CPU, and where nobody has said."""
        return cards_of(self.environment)[1]

    @property
    def shares_gpu(self) -> bool:
        """Whether stages take turns on a card: its idle time is then no bubble of any of them."""
        return 0 < self.gpus < self.config.stages

    def write(self, path: Path) -> None:
        derived = {
            "first_step_seconds": self.first_step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "final_loss": self.final_loss,
        }
        # Never half a result under its name: a killed parent leaves the former one, or none.
        # The new file takes the name in one step, whoever reads it meanwhile.
        partial = path.with_name(f".{path.name}.partial")
        write_file(
            partial,
            json.dumps(json.loads(self.model_dump_json()) | {"derived": derived}, indent=1) + "\n",
        )
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read a result. Raises ResultError for any other file, or another schema version."""
        try:
            content = json.loads(read_text(path, MAX_RESULT_BYTES))
            found = content.pop("schema_version")
            content.pop("derived", None)
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ResultError(f"{path}: not a result ({type(error).__name__}: {error})") from None
        if found == 1:
            content = _from_version_1(content)
        elif found not in (2, 3, SCHEMA_VERSION):
            raise ResultError(
                f"{path}: schema_version = {found}; this program reads 1 to {SCHEMA_VERSION}"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])).encode("unicode_escape").decode()[:200]
            raise ResultError(f"{path}: {place}: {first['msg']}") from None


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 timed all steps but the first, and kept the events of the last."""
    return {key: value for key, value in content.items() if key != "last_step_events"} | {
        "untimed_steps": 1,
        "median_step_events": content.get("last_step_events", {}),
    }


def measured(outcome: Outcome, config: RunConfig, untimed_steps: int) -> dict[str, Any]:
    """Return the fields of a `RunResult` that come from the worker."""
    fields: dict[str, Any] = {
        "status": outcome.status,
        "reason": outcome.reason,
        "wall_seconds": outcome.wall_seconds,
        "untimed_steps": untimed_steps,
    }
    if not outcome.parts:
        return fields
    last = outcome.parts[-1]
    # All processes have the same loss and norm; a step ends with the slowest of them.
    steps = [
        Step(
            step=records[-1].step,
            loss=records[-1].loss,
            gradient_norm=records[-1].gradient_norm,
            seconds=max(record.seconds for record in records),
        )
        for records in zip(*(part.steps for part in outcome.parts), strict=True)
    ]
    # By place and not by number: a run that goes on from a checkpoint does not begin with step 0.
    events = [
        {
            device: records
            for part in outcome.parts
            for device, records in part.steps[number].events.items()
        }
        for number in range(len(steps))
    ]
    timing = _timing(events, steps, config, untimed_steps)
    kept = events[timing.median_step if timing else -1]
    return fields | {
        "environment": _merged([part.environment for part in outcome.parts]),
        "steps": tuple(steps),
        "held_out_loss": last.held_out_loss,
        "build_seconds": max(part.build_seconds for part in outcome.parts),
        "peak_memory_bytes": _by_device(part.peak_memory_bytes for part in outcome.parts),
        "held_activation_peak_bytes": _by_device(
            part.held_activation_peak_bytes for part in outcome.parts
        ),
        "in_flight_peak": _by_device(part.in_flight_peak for part in outcome.parts),
        "actions": {
            device: " ".join(record.action for record in records)
            for device, records in kept.items()
        },
        "timing": timing,
        "median_step_events": kept,
        "corpus_digest": last.corpus_digest,
        "corpus_bytes": last.corpus_bytes,
        "tokenizer_digest": last.tokenizer_digest,
    }


def _timing(
    events: Sequence[dict[int, list[EventRecord]]],
    steps: Sequence[Step],
    config: RunConfig,
    untimed_steps: int,
) -> Timing | None:
    """None where the executor recorded nothing, or something that is no schedule."""
    try:
        schedule = executed_schedule(
            events[-1],
            config.schedule_name,
            config.train.micro_batches,
            config.chunks,
            schedule_of(config).placement,
        )
        return measure(events, [step.seconds for step in steps], schedule, untimed_steps)
    except ScheduleError:
        return None


def cards_of(environment: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the names of a run's cards, each once, and how many stages lie on; none on a CPU."""
    if environment.get("device_kind", "cpu") == "cpu":
        return [], 0
    name, places = environment.get("device_name", "cuda"), environment.get("stage_devices", [])
    names = name if isinstance(name, list) else [name]
    return list(dict.fromkeys(map(str, names))), len(set(map(str, places)))


def _by_device(parts: Iterable[dict[int, int]]) -> dict[int, int]:
    return {device: value for part in parts for device, value in part.items()}


def _merged(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One environment; a value that differs between processes becomes the list of them all."""
    merged: dict[str, Any] = {}
    for key in environments[0]:
        values = [environment.get(key) for environment in environments]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged
