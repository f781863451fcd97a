"""Recomputation: the bits of none, and inputs alone are held."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import ACTIVATION_BYTES, Make, batch, check_same_bits, held_bytes

MODEL: dict[str, Any] = {"num_layers": 4, "dropout": 0.1, "tied_head": True}
RECOMPUTE = ("none", "full", "except-last", "every-1", "every-2")


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2)],
)
def test_recomputation_gives_the_same_bits(make: Make, schedule: str, chunks: int) -> None:
    check_same_bits(
        make, [(2, schedule, {"chunks": chunks, "recompute": r}) for r in RECOMPUTE], 2, **MODEL
    )


def test_recomputation_holds_the_input_of_each_piece_and_nothing_else(make: Make) -> None:
    one, anchor = ACTIVATION_BYTES, 4  # of the embedding's piece, whose tokens are the mini-batch's
    assert held_bytes(make, "full", "gpipe", **MODEL) == {0: 4 * anchor, 1: 4 * one}
    assert held_bytes(make, "full", **MODEL) == {0: 2 * anchor, 1: one}
    assert held_bytes(make, "every-1", **MODEL) == {0: 2 * (2 * one + anchor), 1: 3 * one}
    engine = make(2, run={"recompute": "except-last"}, **MODEL)
    engine.forward_backward(batch(engine))
    held = engine.held_bytes_peak()[1]
    assert (
        held == engine.on_all(_forward_bytes)[1] == held_bytes(make, "none", **MODEL)[1] > 30 * one
    )


def _forward_bytes(engine: Any) -> dict[int, int]:
    """What the forward of the rank's one chunk holds for the last micro-batch, which alone is not
    recomputed.
    """
    return {engine.devices[0]: engine.stage.held.bytes_of(3)[0]}
