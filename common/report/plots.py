"""Pictures of a report, as PNG: loss curves, throughput, where the time goes, sweeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.io.figure import log_y, new_figure
from common.report.collect import Collection
from common.report.losses import LossCurve
from common.report.sweep import Curve

if TYPE_CHECKING:
    pass

FRAMEWORK_COLORS = {"torch": "#d1495b", "tensorflow": "#e8a33d", "paddle": "#3b7dd8"}
ORACLE_COLOR = "#8a8f98"
PART_COLORS = {
    "compute": "#4f9d69",
    "communication wait": "#8e6bbf",
    "schedule wait": "#b8bec9",
    "host": "#d1495b",
    "rest": "#c99a3f",
}
DASHES = ("-", "--", ":", "-.")
DPI = 130


def draw_losses(curves: Sequence[LossCurve], path: Path) -> None:
    """Draw all losses, and below them their relative difference from the oracle, with the limit."""
    figure = new_figure(8.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, curve in enumerate(curves):
        color, dash = FRAMEWORK_COLORS[curve.framework], DASHES[number % len(DASHES)]
        above.plot(range(len(curve.losses)), curve.losses, dash, color=color, label=curve.name)
        if curve.differences:
            # The same double has no place on a logarithmic axis; it stands at half of the smallest
            # possible difference.
            shown = [
                max(difference, sys.float_info.epsilon / 2) for difference in curve.differences
            ]
            below.plot(range(len(shown)), shown, dash, color=color)
    for oracle in {curve.oracle: curve for curve in curves if curve.oracle}:
        above.plot(range(len(oracle)), oracle, ".", color=ORACLE_COLOR, label="oracle")
    for limit in sorted({curve.limit for curve in curves if curve.differences}):
        below.axhline(limit, color=ORACLE_COLOR, linewidth=0.8)
        below.annotate(f"limit {limit:g}", (0, limit), fontsize=7, va="bottom")
    above.set_ylabel("loss per token")
    log_y(below)
    below.set_ylabel("relative difference from the oracle")
    below.set_xlabel("step")
    above.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_throughput(collection: Collection, path: Path) -> None:
    """Draw a bar per measured row, with its steps' 10th to 90th percentile; pale if not ranked."""
    rows = [row for row in collection.rows if row.tokens_per_second and row.step_ms_median]
    figure = new_figure(8.0, 0.34 * len(rows) + 1.0)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        value = row.tokens_per_second or 0.0
        slow, fast = (
            value * (row.step_ms_median or 1) / (each or row.step_ms_median or 1)
            for each in (row.step_ms_p90, row.step_ms_p10)
        )
        axes.barh(
            place, value, color=FRAMEWORK_COLORS[row.framework], alpha=1.0 if row.ranked else 0.3
        )
        axes.plot([slow, fast], [place, place], color="#30343b", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, with the 10th to 90th percentile of the steps")
    figure.savefig(path, dpi=DPI)


def draw_time_split(collection: Collection, path: Path) -> None:
    """Draw every stage's mean step time, stacked by its parts."""
    bars = [
        (f"{row.name}, stage {device}", time)
        for row, group in zip(collection.rows, collection.groups, strict=True)
        if group.shown and group.shown.result.timing
        for device, time in group.shown.result.timing.stages.items()
    ]
    figure = new_figure(8.0, 0.26 * len(bars) + 1.3)
    axes = figure.subplots()
    for place, (_, time) in enumerate(bars):
        left = 0.0
        for part, color in PART_COLORS.items():
            width = float(getattr(time, part.replace(" ", "_"))) * 1e3
            axes.barh(place, width, left=left, color=color, label=part if place == 0 else None)
            left += width
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms of the mean step")
    figure.legend(loc="outside lower right", ncols=len(PART_COLORS), fontsize=7, frameon=False)
    figure.savefig(path, dpi=DPI)


def draw_sweep(curves: Sequence[Curve], path: Path) -> None:
    """Draw throughput over the swept axis; the ideal is dotted, the knee has a ring."""
    figure = new_figure(8.0, 4.5)
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        color = FRAMEWORK_COLORS[curve.framework]
        axes.plot(
            curve.x,
            curve.tokens_per_second,
            "o" + DASHES[number % 2],
            color=color,
            label=curve.name,
            markersize=4,
        )
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        axes.plot(curve.x, curve.ideal, ":", color=color, linewidth=1)
        if curve.knee is not None:
            at = curve.tokens_per_second[curve.x.index(curve.knee)]
            axes.plot([curve.knee], [at], "o", markersize=11, fillstyle="none", color=color)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for curve in curves for x in curve.x})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(curves[0].axis.replace("_", "-"))
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    axes.set_title("dotted: the first point scaled by the ideal; ring: the knee", fontsize=8)
    figure.savefig(path, dpi=DPI)
