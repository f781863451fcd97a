"""Masks: ours, which are NumPy's to the bit, and PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.spec.dropout_masks import step_key
from tests.engines import SAMPLES, STEP_KEY, Make, batch, check_same_bits, every_mask, numpy_mask
from torch_impl.dropout import DropoutContext, ElementHashes, keep_mask, native_dropout


@every_mask
def test_masks_are_numpys_to_the_bit(site: int, shape: tuple[int, ...], probability: float) -> None:
    context = DropoutContext(STEP_KEY, torch.from_numpy(SAMPLES), 3, ElementHashes())
    found = keep_mask(context, site, torch.Size(shape), probability).numpy()
    np.testing.assert_array_equal(found, numpy_mask(site, shape, probability))


def test_native_masks_are_the_same_in_every_run_and_schedule(make: Make) -> None:
    runs = [
        (1, "gpipe", "none"),
        (2, "1f1b", "none"),
        (2, "zb-h1", "full"),
        (2, "gpipe", "every-1"),
    ]
    options = {"dropout": 0.5, "dropout_masks": "native"}
    check_same_bits(
        make, [(p, schedule, {"recompute": kind}) for p, schedule, kind in runs], 2, **options
    )


def test_native_masks_are_not_ours_and_absent_from_evaluation(make: Make) -> None:
    native, shared = (
        make(2, "gpipe", dropout=0.5, dropout_masks=masks) for masks in ("native", "shared")
    )
    evaluated = native.evaluate(batch(native))
    assert evaluated == native.evaluate(batch(native)) == shared.evaluate(batch(shared))
    assert native.forward_backward(batch(native)) != shared.forward_backward(batch(shared))


def test_native_masks_keep_the_share_they_should_and_differ_by_site() -> None:
    context = DropoutContext(step_key(0, 0), torch.arange(8), 0, ElementHashes(), torch.Generator())
    first, other = (native_dropout(torch.ones(8, 100, 100), 0.3, site, context) for site in (0, 1))
    assert (first != 0).double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert not torch.equal(first, other)
