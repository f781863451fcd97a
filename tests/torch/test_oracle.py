"""Predictions beyond the parity ladder against the oracle."""

from __future__ import annotations

import pytest

from tests.engines import Make, check_predictions


@pytest.mark.parametrize(
    ("stages", "schedule", "executor"), [(2, "zb-h1", "table"), (1, "gpipe", "plain")]
)
def test_predictions_are_the_oracles(make: Make, stages: int, schedule: str, executor: str) -> None:
    engine = make(stages, schedule, dtype="float64", dropout=0.1, run={"executor": executor})
    check_predictions(engine, (5, 16), (8, 3))
