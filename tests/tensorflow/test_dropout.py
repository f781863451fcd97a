"""Masks: ours, which are NumPy's to the bit, and TensorFlow's own."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.engines import SAMPLES, STEP_KEY, Make, batch, check_same_bits, every_mask, numpy_mask
from tf_impl.dropout import DropoutContext, keep_mask, native_dropout


@every_mask
def test_masks_are_numpys_to_the_bit(site: int, shape: tuple[int, ...], probability: float) -> None:
    context = DropoutContext(tf.constant(STEP_KEY, tf.int64), tf.constant(SAMPLES))
    found = keep_mask(context, site, tf.TensorShape(shape), probability).numpy()
    np.testing.assert_array_equal(found, numpy_mask(site, shape, probability))


def test_native_masks_are_the_same_in_every_run_and_schedule(make: Make) -> None:
    runs = [(1, "gpipe", {}), (1, "gpipe", {}), (2, "zb-h1", {})]
    check_same_bits(make, runs, 2, num_layers=1, dropout=0.5, dropout_masks="native")


def test_native_masks_are_not_ours_and_absent_from_evaluation(make: Make) -> None:
    native, shared = (
        make(1, "gpipe", num_layers=1, dropout=0.5, dropout_masks=m) for m in ("native", "shared")
    )
    evaluated = native.evaluate(batch(native))
    assert evaluated == native.evaluate(batch(native)) == shared.evaluate(batch(shared))
    assert native.forward_backward(batch(native)) != shared.forward_backward(batch(shared))


def test_native_masks_keep_the_share_they_should_and_differ_by_site_step_and_micro_batch() -> None:
    ones, context = (
        tf.ones((8, 100, 100)),
        DropoutContext(tf.constant(5, tf.int64), tf.range(8, dtype=tf.int64)),
    )
    step, later = (
        context._replace(step_key=context.step_key + 1),
        context._replace(samples=context.samples + 8),
    )
    places = ((0, context), (1, context), (0, step), (0, later))
    first, *others = (native_dropout(ones, 0.3, site, where).numpy() for site, where in places)
    assert len({mask.tobytes() for mask in (first, *others)}) == 4
    assert (first > 0).mean() == pytest.approx(0.7, abs=0.01)
    assert first.mean() == pytest.approx(1, abs=0.02)
    rarely = native_dropout(tf.cast(ones, tf.bfloat16), 0.01, 0, context).numpy()
    # TensorFlow's own op drops 0.016 in bfloat16.
    assert (rarely == 0).mean() == pytest.approx(0.01, abs=0.002)
