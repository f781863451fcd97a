"""Training that goes on from exported weights and moments."""

from __future__ import annotations

import pytest

from tests.engines import ELSEWHERE, Make, check_resumes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.0), ("sgd", 0.9), ("sgd", 0.0)])
def test_going_on_from_exported_state_gives_the_bits_of_a_run_without_interruption(
    make: Make, dtype: str, optimizer: str, momentum: float
) -> None:
    options = {"optimizer": optimizer, "momentum": momentum}
    check_resumes(make, ELSEWHERE, dtype=dtype, train=options, tied_head=True, dropout=0.1)
