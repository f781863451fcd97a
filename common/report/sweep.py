"""Throughput over micro-batches, stages or replicas, beside what the bubble alone would leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.report.statistics import LEAST_REPEATS, LEAST_STEPS, TOO_FEW
from common.report.tables import KIND, Row

KNEE_GAIN = 0.10

Axis = Literal["micro_batches", "stages", "replicas"]


@dataclass(frozen=True)
class Curve:
    """One configuration over one axis, in tokens/s, with the steps' 10th to 90th percentile."""

    name: str
    framework: str
    axis: Axis
    x: tuple[int, ...]
    tokens_per_second: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ideal: tuple[float, ...]
    """The first point's throughput scaled by the ideal efficiency: what the bubble alone would
    leave. Empty where stages share a GPU: it is not the bubble that limits them."""

    is_judged: bool = True
    """Whether every point has enough samples for a verdict."""

    @property
    def knee(self) -> int | None:
        """The first x after which the gain is below `KNEE_GAIN`; None without one."""
        if not self.is_judged:
            return None
        # 100, 112 and 118 tokens/s gain 12 % and then 5 %: the knee is at the second.
        for here, now, after in zip(
            self.x, self.tokens_per_second, self.tokens_per_second[1:], strict=False
        ):
            if after / now - 1 < KNEE_GAIN:
                return here
        return None

    @property
    def sentence(self) -> str:
        what = self.axis.replace("_", "-")
        if not self.is_judged:
            return (
                f"{self.name}: {TOO_FEW} to name a knee over {what}; it takes {LEAST_STEPS} timed "
                f"steps in each of {LEAST_REPEATS} repeats"
            )
        if self.knee is None:
            return (
                f"{self.name}: no knee up to {what} = {self.x[-1]}, every step gains at least "
                f"{KNEE_GAIN:.0%}"
            )
        return (
            f"{self.name}: knee at {what} = {self.knee}, the next step gains less than "
            f"{KNEE_GAIN:.0%}"
        )


def ideal_efficiency(
    axis: Axis, stages: int, micro_batches: int, batch_size: int, replicas: int = 1
) -> float:
    """m / (m + p - 1), the busy share of GPipe and 1F1B (Huang et al. 2019); times p or d where
    that is what is varied.

    Where m does not divide the mini-batch, the first micro-batches have one sequence more, and they
    fill the pipeline.
    """
    # 16 sequences as 4 micro-batches over 4 stages: 4 + 3 slots of one micro-batch each, 4 of them
    # busy on every stage, so 4 / 7. Rounded up where they are unequal.
    largest = -(-batch_size // (replicas * micro_batches))
    own = batch_size / replicas
    efficiency = own / (own + (stages - 1) * largest)
    return efficiency * {"stages": stages, "replicas": replicas}.get(axis, 1)


def curves(rows: Sequence[Row], axis: Axis) -> list[Curve]:
    """Return a curve for every set of ranked rows that differ in `axis` alone."""
    # A curve is what differs in one axis alone: everything else is the key.
    together: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.ranked and row.tokens_per_second:
            together.setdefault(_shared(row, axis), []).append(row)
    found = []
    for same in together.values():
        same.sort(key=lambda row: int(getattr(row, axis)))
        if len(same) < 2:
            continue
        throughput = [row.tokens_per_second or 0.0 for row in same]
        efficiency = [
            ideal_efficiency(axis, row.stages, row.micro_batches, row.batch_size, row.replicas)
            for row in same
        ]
        low, high = zip(*(row.throughput_range for row in same), strict=True)
        words = same[0].name.split()
        found.append(
            Curve(
                name=" ".join(word for word in words if not word.startswith(_MARK[axis])),
                framework=same[0].framework,
                axis=axis,
                x=tuple(int(getattr(row, axis)) for row in same),
                tokens_per_second=tuple(throughput),
                low=low,
                high=high,
                ideal=()
                if any(row.shares_gpu for row in same)
                else tuple(throughput[0] * each / efficiency[0] for each in efficiency),
                is_judged=all(
                    row.repeats >= LEAST_REPEATS and row.timed_steps >= LEAST_STEPS for row in same
                ),
            )
        )
    return found


_MARK = {"micro_batches": "m=", "stages": "p=", "replicas": "d="}


def _shared(row: Row, axis: Axis) -> tuple[object, ...]:
    """What the rows of one curve have in common."""
    sizes = ("stages", "chunks", "replicas", "shards", "micro_batches")
    names = ("schedule", *sizes, "executor", *KIND)
    return tuple(getattr(row, name) for name in names if name != axis)
