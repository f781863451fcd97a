"""Training that goes on from exported weights and moments."""

from __future__ import annotations

import pytest

from tests.engines import ELSEWHERE, Make, assert_within, batch, check_resumes, oracle_of, train


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.0), ("sgd", 0.9)])
def test_going_on_from_exported_state_gives_the_bits_of_a_run_without_interruption(
    make: Make, dtype: str, optimizer: str, momentum: float
) -> None:
    options = {"optimizer": optimizer, "momentum": momentum}
    check_resumes(make, ELSEWHERE, dtype=dtype, train=options, tied_head=True, dropout=0.1)


def test_weight_decay_may_be_zero(make: Make) -> None:
    engine = make(1, "gpipe", dtype="float64", train={"weight_decay": 0.0})
    oracle = oracle_of(engine)
    train(engine, range(3))
    for step in range(3):
        oracle.forward_backward(batch(engine, step))
        oracle.apply_gradients(step)
    assert_within(engine.weights(), oracle.weights(), "trained_parameter", "float64")
