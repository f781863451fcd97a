"""The outcome of a job, however it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.runtime.job import Part

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job. `parts` is complete if `status` is "ok", else empty."""

    status: Status
    reason: str
    log: Path | None
    parts: tuple[Part, ...]
    wall_seconds: float
