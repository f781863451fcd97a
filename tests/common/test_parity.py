"""The comparison itself: it must fail where it should, and name the first place."""

from __future__ import annotations

import math

import numpy as np

from common.oracle.limits import (
    BFLOAT16_FACTOR,
    LIMITS,
    LOSS_ERROR_FLOOR,
    compare,
    relative_margins,
)
from common.spec.parameters import TensorKey

KEYS = [TensorKey(0, "forward", 0, i, f"block.{i}", "output") for i in range(3)]


def test_keys_read_back() -> None:
    for key in [*KEYS, TensorKey(3, "backward", 2, -1, "head", "head.norm.bias")]:
        assert TensorKey.parse(str(key)) == key


def test_the_first_tensor_that_differs_is_named_with_both_values() -> None:
    expected = {key: np.arange(6.0).reshape(2, 3) for key in KEYS}
    observed = {key._replace(stage=1): value.copy() for key, value in expected.items()}
    observed[KEYS[1]._replace(stage=1)][1, 2] = 5.5
    observed[KEYS[2]._replace(stage=1)][0, 0] = 7.0
    comparison = compare(observed, expected, "activation", "float64")
    assert not comparison.passed
    first = comparison.first_failure
    assert first is not None and (first.key.unit, first.key.stage, first.where) == (
        "block.1",
        1,
        (1, 2),
    )
    assert (first.observed, first.expected) == (5.5, 5.0)
    for part in (
        "step=0",
        "phase=forward",
        "stage=1",
        "micro_batch=1",
        "unit=block.1",
        "5.5",
        "5.0",
        "2 of 3",
    ):
        assert part in comparison.report()


def test_missing_misshaped_and_nan_tensors_fail() -> None:
    expected = {KEYS[0]: np.ones(4)}
    for wrong in ({}, {KEYS[0]: np.ones(3)}, {KEYS[0]: np.array([1, 1, np.nan, 1])}):
        assert not compare(wrong, expected, "gradient", "float32").passed


def test_margins_are_over_the_limit() -> None:
    expected = {KEYS[0]: np.ones(4)}
    observed = {KEYS[0]: np.ones(4) * (1 + 5e-6)}
    margin = compare(observed, expected, "gradient", "float32").margins()["gradient"]
    assert math.isclose(margin, 5e-6 / LIMITS["gradient"]["float32"], rel_tol=1e-6)


def test_errors_in_bfloat16_are_judged_by_the_smallest() -> None:
    errors = [{"loss": 0.0, "gradient": 0.01}, {"loss": 2 * LOSS_ERROR_FLOOR, "gradient": 0.02}]
    best, second = relative_margins([*errors, {"loss": 1e-9, "gradient": 0.031}])[:2]
    # A loss that is right by luck is no better than the floor.
    assert best["loss"] == 1 / BFLOAT16_FACTOR
    assert math.isclose(best["gradient"], 1 / BFLOAT16_FACTOR)
    assert math.isclose(second["loss"], 2 / 3) and math.isclose(second["gradient"], 2 / 3)
    assert relative_margins([*errors, {"loss": 1e-9, "gradient": 0.031}])[2]["gradient"] > 1
    assert relative_margins([{"gradient": math.nan}, {"gradient": 0.1}])[0]["gradient"] == math.inf
    assert relative_margins([{"gradient": 0.0}, {"gradient": 0.1}])[1]["gradient"] == math.inf


def test_what_rounded_weights_do_to_a_loss_curve_is_no_frameworks_error() -> None:
    errors = [{"loss": 0.001, "loss_curve": 0.001}, {"loss": 0.001, "loss_curve": 0.006}]
    assert relative_margins(errors)[1]["loss_curve"] == 2
    lucky, other = relative_margins(errors, curve_floor=0.003)
    assert math.isclose(lucky["loss_curve"], 1 / 3) and math.isclose(other["loss_curve"], 2 / 3)
    assert math.isclose(other["loss"], 1 / 3)


def test_errors_are_the_worst_per_check_and_the_median_of_the_gradients() -> None:
    expected = {key: np.ones(4) for key in KEYS}
    observed = {
        key: np.ones(4) * (1 + step) for key, step in zip(KEYS, (0.01, 0.03, 0.02), strict=True)
    }
    errors = compare(observed, expected, "gradient", "bfloat16").errors()
    assert math.isclose(errors["gradient"], 0.03) and math.isclose(errors["gradient_median"], 0.02)
