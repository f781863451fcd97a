"""Training that goes on from exported weights and moments."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import ELSEWHERE, Make, check_resumes

MOMENTUM = {"optimizer": "sgd", "momentum": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "adamw float32 tied": {"tied_head": True, "dropout": 0.1},
    "adamw float64": {"dtype": "float64"},
    "momentum float64 tied": {"dtype": "float64", "train": MOMENTUM, "tied_head": True},
    "momentum float32": {"train": MOMENTUM},
    "sgd float32": {"train": {"optimizer": "sgd"}},
}


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_exported_state_gives_the_bits_of_a_run_without_interruption(
    make: Make, case: str
) -> None:
    check_resumes(make, ELSEWHERE, **CASES[case])
