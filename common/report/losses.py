"""Loss curves and their distance from the oracle's."""

from __future__ import annotations

from dataclasses import dataclass

from common.oracle.limits import LIMITS
from common.report.collect import Collection


@dataclass(frozen=True)
class LossCurve:
    """One row's losses, and their distance from the oracle's."""

    name: str
    framework: str
    losses: tuple[float, ...]
    oracle: tuple[float, ...]
    """Empty where there was none."""
    limit: float
    """Of the relative difference, by the row's precision."""
    first_step: int = 0

    @property
    def differences(self) -> tuple[float, ...]:
        """Relative; empty without an oracle."""
        return tuple(
            abs(seen / right - 1) for seen, right in zip(self.losses, self.oracle, strict=False)
        )


def loss_curves(collection: Collection) -> list[LossCurve]:
    """Return one curve for every row that trained."""
    return [
        LossCurve(
            name=row.name,
            framework=row.framework,
            losses=tuple(step.loss for step in trained.steps),
            oracle=tuple(step.loss for step in group.oracle.steps) if group.oracle else (),
            limit=LIMITS["loss_curve"][trained.config.train.dtype],
        )
        for row, group in collection.pairs
        if (trained := group.trained)
    ]
