"""Masks: ours, which are NumPy's to the bit, and Paddle's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from paddle_impl.dropout import DropoutContext, keep_mask
from tests.engines import SAMPLES, STEP_KEY, Make, batch, check_same_bits, every_mask, numpy_mask

NATIVE = {"dropout": 0.1, "dropout_masks": "native"}


@every_mask
def test_masks_are_numpys_to_the_bit(site: int, shape: tuple[int, ...], probability: float) -> None:
    found = keep_mask(
        DropoutContext(step_key=STEP_KEY, samples=SAMPLES), site, shape, probability
    ).numpy()
    np.testing.assert_array_equal(found, numpy_mask(site, shape, probability))


def test_native_masks_are_the_same_in_every_run_and_schedule(make: Make) -> None:
    runs: list[tuple[str, dict[str, Any]]] = [
        ("1f1b", {}),
        ("1f1b", {}),
        ("gpipe", {"partition": (1,)}),
        ("zb-h1", {"recompute": "full"}),
        ("1f1b", {"recompute": "every-1"}),
        ("1f1b", {"executor": "native"}),
    ]
    check_same_bits(make, [(2, schedule, run) for schedule, run in runs], 3, **NATIVE)


def test_native_masks_are_not_ours(make: Make) -> None:
    native, shared = make(2, **NATIVE), make(2, **NATIVE | {"dropout_masks": "shared"})
    assert native.forward_backward(batch(native)) != shared.forward_backward(batch(shared))
