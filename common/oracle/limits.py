"""Comparing tensors by name, in the order of computation, so that a failure names the first place that differs.

Metrics: relative error in the Frobenius norm, ||observed - expected|| / ||expected||, and the largest absolute difference.
Limits are those of `docs/numerics.md`; a limit is never loosened without a measured reason beside it.

In bfloat16 a limit would have to know how many roundings lie between a weight and a gradient. There the frameworks are
judged beside each other (`relative_margins`): they round the same model in the same places, so their errors against the
oracle are of one size, unless one is wrong. `LIMITS` holds only a ceiling then, so that three wrong ones do not pass.
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
    "activation": {"float64": 1e-13, "float32": 3e-6, "bfloat16": 16 * BFLOAT16_ROUNDOFF},
    "loss": {"float64": 1e-13, "float32": 1e-6, "bfloat16": BFLOAT16_ROUNDOFF / 2},
    "gradient": {"float64": 1e-12, "float32": 1e-5, "bfloat16": 32 * BFLOAT16_ROUNDOFF},
    "optimizer_step": {"float64": 1e-14, "float32": 5e-7, "bfloat16": 5e-7},
    "trained_parameter": {"float64": 1e-10, "float32": 1e-4, "bfloat16": 8 * BFLOAT16_ROUNDOFF},
    "loss_curve": {"float64": 1e-11, "float32": 1e-5, "bfloat16": BFLOAT16_ROUNDOFF},
}
"""Of the relative error. In bfloat16 the ceiling that docs/numerics.md describes; the optimizer works in float32 there."""

BFLOAT16_FACTOR = 3.0
"""No framework's error in bfloat16 may be more than this times the smallest."""

JUDGED_BY_LIMITS: tuple[Check, ...] = ("optimizer_step", "trained_parameter")
"""What bfloat16 leaves to `LIMITS`: the optimizer works in float32."""

LOSS_ERROR_FLOOR = BFLOAT16_ROUNDOFF / 16
"""A loss is one number, whose error can be 0 by luck; smaller errors than this count as equal to it."""


class Difference(NamedTuple):
    """One compared tensor."""

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
        return self.relative <= self.limit  # False for NaN

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
        """The worst observed value over its limit, per check; below 1 passes."""
        worst: dict[Check, float] = {}
        for difference in self.differences:
            ratio = difference.relative / difference.limit
            worst[difference.check] = max(worst.get(difference.check, 0.0), ratio)
        return worst

    def errors(self) -> dict[str, float]:
        """The worst relative error per check, of gradients the median over the tensors too."""
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
    """Compares one tensor. A wrong shape counts as an infinite difference."""
    a, b = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        shape = f"{key.tensor} (shape {list(a.shape)}, expected {list(b.shape)})"
        return Difference(key._replace(tensor=shape), check, np.inf, np.inf, limit, (), float("nan"), float("nan"))
    gap = np.abs(a - b)
    where = np.unravel_index(int(np.argmax(np.where(np.isnan(gap), np.inf, gap))), gap.shape) if gap.size else ()
    norm, scale = float(np.linalg.norm(gap)), float(np.linalg.norm(b))
    relative = norm if scale == 0 else norm / scale
    return Difference(
        key, check, relative, float(gap[where]), limit, tuple(int(i) for i in where), float(a[where]), float(b[where])
    )


def compare(
    observed: Mapping[TensorKey, NDArray[Any]],
    expected: Mapping[TensorKey, NDArray[Any]],
    check: Check,
    dtype: str,
) -> Comparison:
    """Compares what `expected` lists, in its order. A tensor that `observed` lacks fails."""
    limit = LIMITS[check][dtype]
    by_place = {key._replace(stage=0): (key, value) for key, value in observed.items()}
    result = []
    for key, value in expected.items():
        found, array = by_place.get(key._replace(stage=0), (key, np.full(0, np.nan)))
        result.append(difference(found, check, array, value, limit))
    return Comparison(tuple(result))


def relative_margins(errors: Sequence[Mapping[str, float]], curve_floor: float = 0.0) -> list[dict[str, float]]:
    """For runs of several frameworks in bfloat16: each one's error per check over its limit; at most 1 passes.

    The limit is `BFLOAT16_FACTOR` times the smallest error among them, but see `LOSS_ERROR_FLOOR`; and of the loss curve's
    errors those below `curve_floor` count as that much. NaN never passes.
    """
    floors = {"loss": LOSS_ERROR_FLOOR, "loss_curve": max(LOSS_ERROR_FLOOR, curve_floor)}

    def counted(check: str, error: float) -> float:
        return error if error != error else max(floors.get(check, 0.0), error)

    smallest: dict[str, float] = {}
    for run in errors:
        for check, error in run.items():
            least = smallest.get(check, np.inf)
            smallest[check] = min(least, counted(check, error)) if error == error else least
    return [
        {
            check: _over(counted(check, error), BFLOAT16_FACTOR * smallest[check])
            for check, error in run.items()
            if check not in JUDGED_BY_LIMITS
        }
        for run in errors
    ]


def _over(error: float, limit: float) -> float:
    if error != error:
        return np.inf
    return error / limit if limit else (np.inf if error else 0.0)
