"""Our rows beside a framework's baselines: its own pipeline, and a plain loop on one device."""

from __future__ import annotations

from dataclasses import dataclass

from common.report.collect import Collection
from common.report.statistics import Ratio, speed_ratio
from common.report.tables import Row, seconds_per_token

LEGEND = (
    "Ratio: our tokens/s over the baseline's, with a 95 % bootstrap interval, paired by repeat; "
    "above 1 ours is faster. "
    "native: the framework's own pipeline with the same stages, schedule, weights, data and "
    "threads. plain: a simple loop "
    "on one device with the whole mini-batch at once and all the threads, so it has no bubble and "
    "no messages."
)


@dataclass(frozen=True)
class BaselineRatio:
    """A row of ours and a baseline that trained the same."""

    ours: Row
    baseline: Row
    ratio: Ratio

    @property
    def verdict(self) -> str:
        return self.ratio.verdict


def baseline_ratios(collection: Collection) -> list[BaselineRatio]:
    """Return every ranked row of ours with every ranked baseline of the same framework, precision
    and benchmark.
    """
    pairs = list(zip(collection.rows, collection.groups, strict=True))
    found = []
    for ours, group in pairs:
        for baseline, baseline_group in pairs:
            if not (
                ours.executor == "table"
                and ours.ranked
                and baseline.ranked
                and _is_baseline_of(ours, baseline)
            ):
                continue
            ratio = speed_ratio(
                seconds_per_token(group.results), seconds_per_token(baseline_group.results)
            )
            if ratio is not None:
                found.append(BaselineRatio(ours, baseline, ratio))
    return found


def _is_baseline_of(ours: Row, baseline: Row) -> bool:
    alike = (
        "framework",
        "dtype",
        "track",
        "source",
        "recompute",
        "dropout",
        "sequence_lengths",
        "drift",
    )
    if any(getattr(ours, name) != getattr(baseline, name) for name in alike):
        return False
    same = all(
        getattr(ours, name) == getattr(baseline, name)
        for name in ("schedule", "stages", "chunks", "micro_batches")
    )
    return baseline.executor == "plain" or (baseline.executor == "native" and same)
