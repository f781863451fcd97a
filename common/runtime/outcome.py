"""The outcome of a job, however it ended."""

from __future__ import annotations

from collections.abc import Sequence
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


def of_first_line(parts: Sequence[Part], stages: int) -> tuple[Part, ...]:
    """Return line 0's parts with the peak memory of all: device s of line l has the number l x
    stages + s there. All else is the same in every line: losses, and times by the sums.
    """
    peaks = {
        part.line * stages + device: peak
        for part in parts
        for device, peak in part.peak_memory_bytes.items()
    }
    return tuple(
        part.model_copy(update={"peak_memory_bytes": {} if number else peaks})
        for number, part in enumerate([part for part in parts if part.line == 0])
    )
