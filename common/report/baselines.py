"""Our rows beside a framework's baselines: its own pipeline, and a plain loop on one device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.report.collect import Collection
from common.report.statistics import Ratio, speed_ratio
from common.report.tables import KIND, Row, seconds_per_token

LEGEND = (
    "Ratio: our tokens/s over the baseline's, with a 95 % bootstrap interval, paired by repeat; "
    "above 1 ours is faster. native: the framework's own pipeline with the same stages, schedule, "
    "weights, data and threads. plain: a simple loop on one device with the whole mini-batch at "
    "once and all the threads, so it has no bubble and no messages."
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
    """Return every ranked row of ours with every ranked baseline of one benchmark and `KIND`."""
    found = []
    for ours, group in collection.pairs:
        for baseline, baseline_group in collection.pairs:
            if ours.executor == "table" and ours.ranked and _is_baseline_of(ours, baseline):
                ratio = speed_ratio(
                    seconds_per_token(group.results), seconds_per_token(baseline_group.results)
                )
                found += [BaselineRatio(ours, baseline, ratio)] if ratio else []
    return found


def _is_baseline_of(ours: Row, baseline: Row) -> bool:
    def alike(names: Iterable[str]) -> bool:
        return all(getattr(ours, name) == getattr(baseline, name) for name in names)

    sizes = ("schedule", "stages", "chunks", "replicas", "shards", "micro_batches")
    fits = baseline.executor == "plain" or (baseline.executor == "native" and alike(sizes))
    return baseline.ranked and fits and alike(KIND)
