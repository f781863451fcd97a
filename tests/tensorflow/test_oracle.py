"""Numbers beyond the parity ladder against the oracle: ignored labels, predictions."""

from __future__ import annotations

import pytest

from tests.engines import Make, assert_within, batch, check_predictions, oracle_of


def test_ignored_labels_count_for_nothing_in_the_plain_loop(make: Make) -> None:
    engine = make(1, run={"sequence_lengths": "random", "executor": "plain"})
    expected = {"loss": oracle_of(engine).forward_backward(batch(engine))}
    assert_within({"loss": engine.forward_backward(batch(engine))}, expected, "loss", "float32")


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
