"""Numbers beyond the parity ladder against the oracle: the best track, predictions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engines import Make, assert_within, batch, check_predictions, oracle_of, train


@pytest.mark.parametrize("batch_size", [6, 7])  # 7: micro-batches of 3, 2 and 2
def test_the_best_track_has_the_oracles_gradients(make: Make, batch_size: int) -> None:
    engine = make(1, run={"track": "best"}, train={"batch_size": batch_size, "micro_batches": 3})
    oracle = oracle_of(engine)
    for step in range(2):
        losses = [{"loss": one.forward_backward(batch(engine, step))} for one in (engine, oracle)]
        assert_within(*losses, "loss", "float32")
        assert_within(engine.gradients(), oracle.gradients(), "gradient", "float32")


@pytest.mark.parametrize(
    ("dtype", "norm", "tied_head"), [("float32", "pre", True), ("float64", "post", False)]
)
def test_predictions_are_the_oracles_and_those_of_fleets_own_pipeline(
    make: Make, dtype: str, norm: str, tied_head: bool
) -> None:
    options = {"dtype": dtype, "norm": norm, "tied_head": tied_head, "dropout": 0.1}
    table, native = (
        make(2, run={"executor": executor}, **options) for executor in ("table", "native")
    )
    train(table, [0])
    native.reset(table.weights())
    check_predictions(table, (8, 16), (4, 16), (12, 5))
    tokens = batch(table).inputs
    np.testing.assert_array_equal(table.predict(tokens), native.predict(tokens))


def test_predictions_of_the_plain_loop_are_the_oracles(make: Make) -> None:
    check_predictions(
        make(1, "gpipe", dtype="float64", dropout=0.1, run={"executor": "plain"}), (4, 16), (8, 3)
    )
