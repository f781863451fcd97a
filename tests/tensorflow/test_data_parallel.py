"""MirroredStrategy, the baseline of replicas, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.engines import Make, assert_within, batch, oracle_of


def mirrored(make: Make, tied_head: bool) -> Any:
    """Three replicas, which take 3, 2 and 2 sequences of different lengths."""
    return make(
        1,
        "gpipe",
        dtype="float64",
        tied_head=tied_head,
        dropout=0.1,
        train={"batch_size": 7, "micro_batches": 1, "clip_norm": 0.5},
        run={"executor": "plain", "replicas": 3, "threads": 3, "sequence_lengths": "random"},
    )


@pytest.mark.parametrize("tied_head", [False, True])
def test_the_plain_loop_has_the_oracles_gradients_in_mirrored_strategy(
    make: Make, tied_head: bool
) -> None:
    engine = mirrored(make, tied_head)
    oracle = oracle_of(engine)
    start = engine.weights()
    for step in range(2):
        losses = [{"loss": one.forward_backward(batch(engine, step))} for one in (engine, oracle)]
        assert_within(*losses, "loss", "float64")
        gradients = [one.gradients() for one in (engine, oracle)] if step == 0 else [{}, {}]
        assert_within(*gradients, "gradient", "float64")
        norms = [{"norm": one.apply_gradients(step)} for one in (engine, oracle)]
        assert_within(*norms, "loss", "float64")
    assert_within(engine.weights(), oracle.weights(), "optimizer_step", "float64")
    losses = [{"loss": one.evaluate(batch(engine, 2))} for one in (engine, oracle)]
    assert_within(*losses, "loss", "float64")
    copies = [each.parameter.value.values for each in engine._named]
    assert all(np.array_equal(one, other) for one, *others in copies for other in others)
    # Again, and from given gradients: the same bits, and the oracle's step.
    first = engine.weights()
    engine.reset(start)
    for step in range(2):
        engine.forward_backward(batch(engine, step))
        engine.apply_gradients(step)
    again = engine.weights()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    given = {name: np.full_like(weight, 0.01) for name, weight in start.items()}
    for one in (engine, oracle):
        one.reset(start)
        one.set_gradients(given)
        one.apply_gradients(0)
    assert_within(engine.weights(), oracle.weights(), "optimizer_step", "float64")
