"""Recomputation: the bits of none, and inputs alone are held."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import ACTIVATION_BYTES, Make, check_same_bits, held_bytes

RECOMPUTED: tuple[Any, ...] = (
    (1, "gpipe", {}),
    (3, "zb-h1", {"partition": (1, 3)}),  # the embedding alone on a stage, and the head
    (2, "zb-v", {"chunks": 2}),
)
# Every engine traces and cuts anew, so not every kind runs with every schedule here. The ladder has
# more: two and four stages with 1f1b, "every-1" with a split backward, "except-last".
CASES = {
    "full": RECOMPUTED[1:],
    "every-2": RECOMPUTED[:1],
}


@pytest.mark.parametrize(
    ("masks", "cases"),
    [("shared", CASES), ("native", {"full": RECOMPUTED[1:2]})],
    ids=["shared", "native"],
)
def test_recomputation_gives_the_same_bits(make: Make, masks: str, cases: dict[str, Any]) -> None:
    runs = [
        (p, schedule, run | {"recompute": kind})
        for kind, some in cases.items()
        for p, schedule, run in some
    ]
    check_same_bits(
        make, [(1, "1f1b", {}), *runs], 2, tied_head=True, dropout=0.1, dropout_masks=masks
    )


def test_recomputation_holds_the_input_of_each_piece_and_nothing_else(make: Make) -> None:
    held = {kind: held_bytes(make, kind) for kind in ("none", "full", "except-last", "every-1")}
    one = ACTIVATION_BYTES
    assert held["full"] == {0: 0, 1: one}  # the first stage's input is the mini-batch itself
    assert held["every-1"] == {0: 2 * one, 1: 2 * one}
    assert held["except-last"][1] == held["none"][1] > 10 * one
    assert held["except-last"][0] == held["none"][0] / 2  # one of the two in flight
