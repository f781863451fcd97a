"""Paddle's habits in the drift zoo. Its stages are processes, so these runs are in a worker."""

from __future__ import annotations

import pytest

from common.harness.zoo import run_zoo
from common.spec.habits import DRIFTS

NAMES = [drift.name for drift in DRIFTS if "paddle" in drift.frameworks]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    rows = run_zoo(
        tmp_path_factory.mktemp("zoo"),
        ["paddle"],
        NAMES,
        [10],
        seeds=1,
        timeout_seconds=float("inf"),
    )[0]
    return {row.name: row.verdict if row.verdict == "as expected" else str(row) for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_a_habit_fails_the_ladder_where_the_zoo_says_and_its_baseline_passes(
    verdicts: dict[str, str], name: str
) -> None:
    assert verdicts[name] == "as expected"
