"""`result.json`: everything that is known about one run, under a schema version."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.report.machine import Machine
from common.runtime.job import EventRecord
from common.runtime.launch import Outcome, Status
from common.spec import RunConfig

SCHEMA_VERSION = 1


class ResultError(ValueError):
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

    status: Literal["pass", "FAIL", "not checked"] = "not checked"
    reason: str = ""
    """The first tensor that differs, or why there was no comparison."""
    tensors: int = 0
    """How many were compared."""
    margins: dict[str, float] = {}
    """The worst observed error over its limit, per check; below 1 passes."""


class RunResult(BaseModel):
    """One run of one framework. What was not measured is None or empty: a failed or skipped run is a result too."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    status: Status
    reason: str = ""
    log: str | None = None
    """Path of the child's log or traceback, relative to the folder of the whole benchmark."""
    preset: str
    repeat: int = 0
    config: RunConfig
    environment: dict[str, Any] = {}
    """Versions, devices, threads and flags as the child read them back."""
    steps: tuple[Step, ...] = ()
    held_out_loss: float | None = None
    build_seconds: float | None = None
    """Building the model, before the first step."""
    wall_seconds: float = 0.0
    """The whole child process, imports included."""
    peak_memory_bytes: dict[int, int] = {}
    """By device on CUDA; by the first device of each process on the CPU."""
    actions: dict[int, str] = {}
    """What each device did in one step, as executed, in the schedule's text form."""
    last_step_events: dict[int, list[EventRecord]] = {}
    """The actions of the last step with their times."""
    corpus_digest: str | None = None
    corpus_bytes: int | None = None
    parity: Parity = Parity()
    command: str
    machine: Machine
    git_commit: str | None = None
    started: str = Field("", description="ISO 8601, UTC")

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context_length

    @property
    def first_step_seconds(self) -> float | None:
        """Apart from the others: it traces, compiles and fills caches."""
        return self.steps[0].seconds if self.steps else None

    @property
    def steady_seconds(self) -> tuple[float, ...]:
        """Seconds of every step after the first."""
        return tuple(step.seconds for step in self.steps[1:])

    @property
    def tokens_per_second(self) -> float | None:
        """Trained tokens over the median time of the steps after the first."""
        return self.tokens_per_step / statistics.median(self.steady_seconds) if self.steady_seconds else None

    @property
    def final_loss(self) -> float | None:
        return self.steps[-1].loss if self.steps else None

    @property
    def version(self) -> str:
        return str(self.environment.get("version", ""))

    def write(self, path: Path) -> None:
        derived = {
            "first_step_seconds": self.first_step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "final_loss": self.final_loss,
        }
        path.write_text(json.dumps(json.loads(self.model_dump_json()) | {"derived": derived}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Raises ResultError for a file that is not a result, or of another schema version."""
        try:
            content = json.loads(path.read_text())
            found = content.pop("schema_version")
            content.pop("derived", None)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ResultError(f"{path}: not a result ({type(error).__name__}: {error})") from None
        if found != SCHEMA_VERSION:
            raise ResultError(f"{path}: schema_version = {found}; this program reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ResultError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def measured(outcome: Outcome) -> dict[str, Any]:
    """The fields of a `RunResult` that come from the child."""
    fields: dict[str, Any] = {
        "status": outcome.status,
        "reason": outcome.reason,
        "wall_seconds": outcome.wall_seconds,
    }
    if not outcome.parts:
        return fields
    last = outcome.parts[-1]
    events = {device: records for part in outcome.parts for device, records in part.steps[-1].events.items()}
    return fields | {
        "environment": _merged([part.environment for part in outcome.parts]),
        "steps": tuple(
            Step(
                step=records[-1].step,
                loss=records[-1].loss,
                gradient_norm=records[-1].gradient_norm,
                seconds=max(record.seconds for record in records),
            )
            for records in zip(*(part.steps for part in outcome.parts), strict=True)
        ),
        "held_out_loss": last.held_out_loss,
        "build_seconds": max(part.build_seconds for part in outcome.parts),
        "peak_memory_bytes": {
            device: peak for part in outcome.parts for device, peak in part.peak_memory_bytes.items()
        },
        "actions": {device: " ".join(record.action for record in records) for device, records in events.items()},
        "last_step_events": events,
        "corpus_digest": last.corpus_digest,
        "corpus_bytes": last.corpus_bytes,
    }


def _merged(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One environment; a value that differs between processes becomes the list of them all."""
    merged: dict[str, Any] = {}
    for key in environments[0]:
        values = [environment.get(key) for environment in environments]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged
