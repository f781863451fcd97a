"""Compare tensors by name, in the order of computation: a failure names the first that differs.

Metrics: the relative error in the Frobenius norm, ||observed - expected|| / ||expected||, and the
largest absolute difference. Limits are those of `docs/numerics.md`; a limit is never loosened
without a measured reason beside it.

In float64 and float32 a fixed limit per check decides (`LIMITS`). In bfloat16 there can be none
that is tight: it would have to know how many roundings lie between a weight and a gradient. So the
verdict there has two parts:

    ceiling   `LIMITS`, wide: three implementations that are all wrong must not pass
    others    `relative_margins`: the frameworks round the same model in the same places, so their
              errors against the oracle have the same size; one that is 3 times off is wrong

    For example, gradient errors of 0.010, 0.012 and 0.031 against the oracle: all are below the
    ceiling of 32 x 2^-8 = 0.125, but 0.031 > 3 x 0.010 fails.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.spec.parameters import Check, TensorKey

BFLOAT16_ROUNDOFF = 2.0**-8
"""The largest relative error of rounding to bfloat16's 8 significant bits."""

LIMITS: dict[Check, dict[str, float]] = {
    # One unit, or all of them one behind the other: a few dozen roundings of 1e-16, or 6e-8.
    "activation": {"float64": 1e-13, "float32": 3e-6, "bfloat16": 16 * BFLOAT16_ROUNDOFF},
    "loss": {"float64": 1e-13, "float32": 1e-6, "bfloat16": BFLOAT16_ROUNDOFF / 2},
    "gradient": {"float64": 1e-12, "float32": 1e-5, "bfloat16": 32 * BFLOAT16_ROUNDOFF},
    # From the same gradient: a handful of operations on each number by itself.
    "optimizer_step": {"float64": 1e-14, "float32": 5e-7, "bfloat16": 5e-7},
    # After 100 steps each rounding has grown with every step that followed it.
    "trained_parameter": {"float64": 1e-10, "float32": 1e-4, "bfloat16": 8 * BFLOAT16_ROUNDOFF},
    "loss_curve": {"float64": 1e-11, "float32": 1e-5, "bfloat16": BFLOAT16_ROUNDOFF},
}
"""Of the relative error, by check and precision. In bfloat16 only a ceiling, but for the
optimizer's step, which is computed in float32 there."""

BFLOAT16_FACTOR = 3.0
"""No framework's error in bfloat16 may be more than this times the smallest."""

JUDGED_BY_LIMITS: tuple[Check, ...] = ("optimizer_step", "trained_parameter")
"""Checks that bfloat16 does not judge between frameworks: `LIMITS` is tight enough for them."""

LOSS_ERROR_FLOOR = BFLOAT16_ROUNDOFF / 16
"""A scalar loss can match by chance, so its error is clamped from below to this."""


class Difference(NamedTuple):
    """One compared tensor; `where` is the index of the largest difference, with both values."""

    key: TensorKey
    check: Check
    relative: float
    largest: float
    limit: float
    where: tuple[int, ...]
    observed: float
    expected: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit  # False for NaN: written so, not as `not >`

    def __str__(self) -> str:
        return (
            f"{self.check} {self.key}: relative error {self.relative:.2e}, limit {self.limit:.0e}; "
            f"largest difference {self.largest:.2e} at {list(self.where)}: "
            f"observed {self.observed!r}, expected {self.expected!r}"
        )


@dataclass(frozen=True)
class Comparison:
    """All compared tensors, in the order of computation."""

    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        return all(difference.passed for difference in self.differences)

    @property
    def first_failure(self) -> Difference | None:
        return next((difference for difference in self.differences if not difference.passed), None)

    def margins(self) -> dict[Check, float]:
        """Return the worst observed value over its limit, per check; at most 1 passes."""
        worst: dict[Check, float] = {}
        for difference in self.differences:
            ratio = difference.relative / difference.limit
            worst[difference.check] = max(worst.get(difference.check, 0.0), ratio)
        return worst

    def errors(self) -> dict[str, float]:
        """Return the worst relative error per check, and the gradients' median ("gradient_median").

        A framework with one wrong gradient shows in the worst, one that rounds more in the median.
        """
        by_check: dict[str, list[float]] = {}
        for difference in self.differences:
            by_check.setdefault(difference.check, []).append(difference.relative)
        found = {check: max(errors) for check, errors in by_check.items()}
        if "gradient" in by_check:
            found["gradient_median"] = statistics.median(by_check["gradient"])
        return found

    def report(self) -> str:
        failed = [difference for difference in self.differences if not difference.passed]
        if not failed:
            return f"all {len(self.differences)} tensors agree"
        return f"{len(failed)} of {len(self.differences)} tensors differ; the first: {failed[0]}"


def difference(
    key: TensorKey, check: Check, observed: NDArray[Any], expected: NDArray[Any], limit: float
) -> Difference:
    """Compare one tensor. A wrong shape counts as an infinite difference."""
    a, b = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    # Without this NumPy would broadcast, and compare a (D,) with a (1, D) or with a scalar.
    if a.shape != b.shape:
        shape = f"{key.tensor} (shape {list(a.shape)}, expected {list(b.shape)})"
        place = key._replace(tensor=shape)
        return Difference(place, check, np.inf, np.inf, limit, (), np.nan, np.nan)
    gap = np.abs(a - b)
    # NaN counts as the largest difference.
    flat = int(np.argmax(np.where(np.isnan(gap), np.inf, gap))) if gap.size else 0
    where = tuple(int(i) for i in np.unravel_index(flat, gap.shape)) if gap.size else ()
    norm, scale = float(np.linalg.norm(gap)), float(np.linalg.norm(b))
    relative = norm if scale == 0 else norm / scale  # an expected 0 has no scale: absolute then
    values = (float(a[where]), float(b[where]))
    return Difference(key, check, relative, float(gap[where]), limit, where, *values)


def compare(
    observed: Mapping[TensorKey, NDArray[Any]],
    expected: Mapping[TensorKey, NDArray[Any]],
    check: Check,
    dtype: str,
) -> Comparison:
    """Compare what `expected` lists, in its order. A tensor that `observed` lacks fails.

    Stages are ignored, so runs with different partitions can be compared.
    """
    limit = LIMITS[check][dtype]
    by_place = {key._replace(stage=0): (key, value) for key, value in observed.items()}
    result = []
    for key, value in expected.items():
        # The observed key names the stage that computed the tensor; a missing one is a wrong shape.
        found, array = by_place.get(key._replace(stage=0), (key, np.full(0, np.nan)))
        result.append(difference(found, check, array, value, limit))
    return Comparison(tuple(result))


def relative_margins(
    errors: Sequence[Mapping[str, float]], curve_floor: float = 0.0
) -> list[dict[str, float]]:
    """Judge bfloat16 runs of several frameworks: return each one's errors over their limits.

    `errors` are of `Comparison.errors`, one mapping per run; the result is in their order, and at
    most 1 passes. The limit of a check is `BFLOAT16_FACTOR` times the smallest error among the
    runs. Errors of a loss count as `LOSS_ERROR_FLOOR` at least, those of the loss curve as
    `curve_floor` at least: what rounded weights alone make of it. NaN never passes.
    """
    floors = {"loss": LOSS_ERROR_FLOOR, "loss_curve": max(LOSS_ERROR_FLOOR, curve_floor)}

    def counted(check: str, error: float) -> float:
        # NaN (the only value unequal to itself) stays: max() could drop it.
        return error if error != error else max(floors.get(check, 0.0), error)

    # [1] The smallest error of each check among the runs.
    smallest: dict[str, float] = {}
    for run in errors:
        for check, error in run.items():
            least = smallest.get(check, np.inf)
            # A run with NaN must not set the limit of the others.
            smallest[check] = min(least, counted(check, error)) if error == error else least
    # [2] Each run's errors over the limits that follow from these.
    return [
        {
            check: _over(counted(check, error), BFLOAT16_FACTOR * smallest[check])
            for check, error in run.items()
            if check not in JUDGED_BY_LIMITS
        }
        for run in errors
    ]


def _over(error: float, limit: float) -> float:
    """Return error / limit; infinite for NaN, and for any error where the best has none."""
    if error != error:
        return np.inf
    return error / limit if limit else (np.inf if error else 0.0)
