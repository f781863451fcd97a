"""The drift zoo's result, as `triptych drift --json` writes it and docs/drift.md is made from."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from common.io.edges import OsText, write_file
from common.spec.run import RunConfig

LADDER_STEPS = 100
"""Over which the loss curve is compared with the oracle's."""


AVERAGED_STEPS = 20
"""Steps whose mean is the loss at a step: that one and those before it."""


Verdict = str
"""One of `GOOD`, or `elsewhere`, `not seen`, `baseline differs`, `skipped: ...`, `failed: ...`."""


GOOD = ("as expected", "within the limits", "needs CUDA")
"""Verdicts that need no attention; within the limits: bits differ, no rung fails (`may_pass`)."""


class Row(BaseModel):
    """What one habit did in one framework."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    name: str
    title: str
    framework: str
    default_of: str
    dtype: str
    verdict: Verdict
    expected_check: str
    expected_place: str
    check: str = ""
    """The first check of the ladder that failed."""
    place: str = ""
    """The first tensor that differed."""
    relative: float | None = None
    limit: float | None = None
    cost: dict[int, float] = {}
    """By number of steps: the mean loss of the last ones, minus the baseline's."""
    spread: dict[int, float] = {}
    """After so many steps: the standard deviation of the baseline's mean loss over the seeds."""
    held_out_cost: float | None = None
    """Of the held-out loss after the last step."""
    held_out_spread: float | None = None
    curve: list[float] = []
    """|loss - baseline's|, the mean of every `CURVE_STRIDE` steps."""

    @property
    def seen(self) -> bool:
        return self.verdict in ("as expected", "elsewhere")


CURVE_STRIDE = 10


class Zoo(BaseModel):
    """The whole result: what `triptych drift` prints, and what docs/drift.md is made from."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    rows: list[Row]
    steps: list[int]
    seeds: int
    spread_framework: str
    spread_curve: list[float] = []
    """The spread between seeds of the plain baseline, over the steps, as `Row.curve`."""
    command: OsText
    machine: str
    versions: dict[str, str]
    config: RunConfig

    def write(self, path: Path) -> None:
        write_file(path, json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n")
