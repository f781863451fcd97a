"""What came of a job, in whatever way it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.runtime.job import Part

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What came of one job. `parts` is complete where `status` is "ok", else empty."""

    status: Status
    reason: str
    log: Path | None
    parts: tuple[Part, ...]
    wall_seconds: float
