"""Medians, percentiles and bootstrap intervals of step times.

A sample is what one step took per token. Samples stay apart by repeat (one process each), because
steps of one process resemble each other: an interval that ignored this would be too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
CONFIDENCE = 0.95
SEED = 0
"""Fixed, so that the same samples give the same interval."""
LEAST_REPEATS = 2
"""With one process the difference between processes is unknown."""
LEAST_STEPS = 6
"""Timed steps in every repeat. Of n values the smallest and the largest hold the median between
them with a probability of 1 - 2^(1-n) (Conover 1999, section 3.2): 94 % of 5, which no interval of
theirs can better, and 97 % of 6.
"""
LEAST_FOR_PERCENTILES = 10
"""Values; a tenth of fewer is less than one value."""
TOO_FEW = "too few samples"
"""The verdict without an interval."""

Samples = Mapping[int, Sequence[float]]
"""Seconds per token of every timed step, by repeat."""


@dataclass(frozen=True)
class Summary:
    """Median, 10th and 90th percentile; of fewer than `LEAST_FOR_PERCENTILES` the median alone."""

    median: float
    p10: float | None
    p90: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a row is as its baseline, with a 95 % bootstrap interval."""

    value: float
    low: float | None
    high: float | None
    """Both None where there are too few samples for an interval (`is_enough`)."""

    @property
    def verdict(self) -> str:
        """What the interval shows, in words."""
        if self.low is None or self.high is None:
            return TOO_FEW
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"

    def text(self, form: str = ".2f") -> str:
        """`0.89 [0.87, 0.92]`"""
        if self.low is None or self.high is None:
            return f"{self.value:{form}} [unknown]"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def is_enough(samples: Samples) -> bool:
    """Return whether they allow an interval: `LEAST_REPEATS` of `LEAST_STEPS` steps each."""
    return len(samples) >= LEAST_REPEATS and min(map(len, samples.values())) >= LEAST_STEPS


def summarize(values: Sequence[float]) -> Summary | None:
    """Return the summary; None for no values."""
    if not values:
        return None
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    enough = len(values) >= LEAST_FOR_PERCENTILES
    return Summary(median, p10, p90) if enough else Summary(median, None, None)


def speed_ratio(row: Samples, baseline: Samples, same_session: bool = True) -> Ratio | None:
    """Return the baseline's median time over the row's (above 1: faster); None without samples.

    Where both have the same repeats, of one session, the ratio is the median of the ratios within
    each repeat: the runs of one repeat follow each other closely, so that a machine that drifts
    from repeat to repeat changes both. The interval is a percentile bootstrap in two stages
    (Davison and Hinkley 1997, section 3.8): repeats, then steps in each; none of too few samples.
    """
    if not row or not baseline or not all(map(len, (*row.values(), *baseline.values()))):
        return None
    paired = same_session and set(row) == set(baseline)
    order = sorted(row)
    rows = [np.asarray(row[repeat], np.float64) for repeat in order]
    # In the same order: paired samples have the same repeats.
    baselines = [np.asarray(baseline[repeat], np.float64) for repeat in sorted(baseline)]
    # Each of the B draws makes a benchmark that might have been: R repeats drawn with replacement
    # from the R that ran, such as (0, 2, 2) of three, and within each of them its steps drawn anew.
    generator = np.random.default_rng(SEED)
    which = generator.integers(len(rows), size=(RESAMPLES, len(rows)))  # (B, R)
    # Paired, both sides draw the same repeats: where repeat 2 ran on a slow machine it is slow for
    # both, and the ratio does not move. Of two sessions, each side draws its own.
    size = (RESAMPLES, len(baselines))
    which_baseline = which if paired else generator.integers(len(baselines), size=size)
    above = _resampled_medians(baselines, which_baseline, generator)  # (B, R)
    below = _resampled_medians(rows, which, generator)
    medians = [np.array([np.median(each) for each in side]) for side in (baselines, rows)]
    if paired:
        value = float(np.median(medians[0] / medians[1]))
        draws = np.median(above / below, axis=1)  # (B,)
    else:
        value = float(np.median(medians[0]) / np.median(medians[1]))
        draws = np.median(above, axis=1) / np.median(below, axis=1)  # (B,)
    if not (is_enough(row) and is_enough(baseline)):
        return Ratio(value, None, None)
    # The middle 95 % of the 4,000 ratios: 100 lie below the interval, 100 above.
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail]).tolist()
    return Ratio(value, low, high)


def _resampled_medians(
    repeats: Sequence[NDArray[np.float64]], which: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """(B, R): for every drawn repeat the median of its steps, drawn anew with replacement."""
    # All draws of one repeat at once, as a matrix of (times drawn, its steps).
    medians = np.empty(which.shape)  # (B, R)
    for number, steps in enumerate(repeats):
        chosen = which == number
        drawn = steps[generator.integers(len(steps), size=(int(chosen.sum()), len(steps)))]
        medians[chosen] = np.median(drawn, axis=1)
    return medians
