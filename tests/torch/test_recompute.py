"""Recomputation: the bits of none, and inputs alone are held."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import ACTIVATION_BYTES, Make, check_same_bits, held_bytes

RECOMPUTED: tuple[Any, ...] = (
    (1, "gpipe", {}),
    (2, "1f1b", {"partition": (1,)}),  # the embedding alone on a stage
    (4, "zb-h1", {}),
    (2, "interleaved", {"chunks": 2}),
    (2, "zb-v", {"chunks": 2}),
)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["full", "except-last", "every-1", "every-2"])
def test_recomputation_gives_the_same_bits(make: Make, recompute: str, dropout: float) -> None:
    runs = [(p, schedule, run | {"recompute": recompute}) for p, schedule, run in RECOMPUTED]
    check_same_bits(make, [(1, "1f1b", {}), *runs], 2, tied_head=True, dropout=dropout)


def test_recomputation_holds_the_input_of_each_piece_and_nothing_else(make: Make) -> None:
    held = {kind: held_bytes(make, kind) for kind in ("none", "full", "except-last", "every-1")}
    one = ACTIVATION_BYTES
    # Stage 0 takes tokens; 1f1b has one micro-batch in flight on stage 1.
    assert held["full"] == {0: 0, 1: one}
    # Stage 0 holds block 0's input for two micro-batches.
    assert held["every-1"] == {0: 2 * one, 1: 2 * one}
    assert held["except-last"][1] == held["none"][1] > 10 * one
    assert held["full"][0] < held["except-last"][0] < held["none"][0]
