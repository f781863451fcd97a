"""What a benchmark is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from common.io.edges import OsText
from common.spec.run import PRESETS, Frozen, RunConfig


@dataclass(frozen=True)
class Bench:
    """A benchmark: every point of the grid, in the order of the table's rows."""

    options: BenchOptions
    points: tuple[RunConfig, ...]
    dry_run: bool = False
    left_out: str = ""
    """The points of the grid that cannot be, and why."""


class BenchOptions(Frozen):
    """Options of the benchmark as a whole."""

    preset: str = Field("small", description=f"where to start from: {', '.join(PRESETS)}")
    repeats: int = Field(
        2,
        ge=1,
        description="runs per row, each in a fresh process, taking turns with the other rows",
    )
    untimed_steps: int = Field(2, ge=0, description="first steps of a run that no statistics count")
    timeout: float | None = Field(
        None, gt=0, description="seconds that one run may take; then it is ended and has failed"
    )
    out: OsText = Field(
        "results",
        min_length=1,
        description="folder in which the benchmark makes a folder of its own",
    )
    parity: bool = Field(
        True, description="run the float64 oracle first and compare every run with it"
    )
    baselines: bool = Field(
        False,
        description="also run each framework's own pipeline, where it has the schedule, and a "
        "plain loop on one device",
    )
    sweep: bool = Field(
        False,
        description="draw throughput against micro-batches, stages or replicas, beside the ideal, "
        "and name the knee",
    )
