"""Numbers beyond the parity ladder against the oracle: short batches, units alone, predictions."""

from __future__ import annotations

import pytest

from tests.engines import (
    Make,
    assert_within,
    batch,
    check_predictions,
    check_short_batch,
    check_units_alone,
    oracle_of,
)

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@every_dtype
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_ignored_labels_and_missing_sequences_count_for_nothing(
    make: Make, dtype: str, micro_batches: int
) -> None:
    check_short_batch(make, dtype, micro_batches)


def test_ignored_labels_count_for_nothing_in_the_plain_loop(make: Make) -> None:
    engine = make(1, run={"sequence_lengths": "random", "executor": "plain"})
    expected = {"loss": oracle_of(engine).forward_backward(batch(engine))}
    assert_within({"loss": engine.forward_backward(batch(engine))}, expected, "loss", "float32")


@every_dtype
@pytest.mark.parametrize(("norm", "tied_head"), [("pre", True), ("post", False)])
def test_units_alone_are_the_oracles_and_leave_the_engine_as_it_was(
    make: Make, dtype: str, norm: str, tied_head: bool
) -> None:
    check_units_alone(make, dtype, norm, tied_head)


@pytest.mark.parametrize(
    ("stages", "schedule", "executor"), [(2, "zb-h1", "table"), (1, "gpipe", "plain")]
)
def test_predictions_are_the_oracles_and_shapes_are_traced_once(
    make: Make, stages: int, schedule: str, executor: str
) -> None:
    engine = make(
        stages, schedule, dtype="float64", num_layers=1, dropout=0.1, run={"executor": executor}
    )
    check_predictions(engine, (4, 16), (8, 3), (4, 16))
    if executor == "table":
        assert [
            chunk.evaluate.experimental_get_tracing_count() for chunk in engine.model.chunks
        ] == [2, 2]
