"""The pictures of a report, each drawn once for its PNG file and the page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.io.figure import log_y, new_figure, small_print
from common.report import mesh_picture
from common.report.collect import Collection
from common.report.losses import LossCurve, loss_curves
from common.report.sweep import Axis, Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMEWORK_COLORS = {"torch": "#d1495b", "tensorflow": "#e8a33d", "paddle": "#3b7dd8"}
ORACLE_COLOR = "#8a8f98"
RANGE_COLOR = "#30343b"
PART_COLORS = {
    "compute": "#4f9d69",
    "communication wait": "#8e6bbf",
    "schedule wait": "#b8bec9",
    "host": "#d9534f",
    "rest": "#c99a3f",
}
DPI = 160
WIDTH_INCHES = 6.4
"""Narrow, so that letters stay legible where a phone shrinks the picture."""


def pictures(collection: Collection, swept: Mapping[Axis, Sequence[Curve]]) -> dict[str, Figure]:
    """Return the figures of a report by their files' names, where there is something to draw."""
    with small_print():
        found = {f"sweep_{axis}": draw_sweep(curves) for axis, curves in swept.items()}
        if losses := loss_curves(collection):
            found["loss"] = draw_losses(losses)
        if any(row.tokens_per_second for row in collection.rows):
            found["throughput"] = draw_throughput(collection)
        if any(group.timing for group in collection.groups):
            found["time_split"] = draw_time_split(collection)
        runs = [group.results[0].config for group in collection.groups]
        if (widest := mesh_picture.most_of(runs)) is not None:
            found["mesh"] = mesh_picture.draw_mesh(widest)
    return found


def line_styles(frameworks: Sequence[str]) -> list[dict[str, Any]]:
    """Return each line's colour, by framework, and its dashes, unlike those of all others of its
    colour: solid, then a dash and one dot, a dash and two dots ...
    """
    seen: Counter[str] = Counter()
    styles = []
    for framework in frameworks:
        dashes = (0, (4, 1) + (1, 1) * seen[framework]) if seen[framework] else "-"
        styles.append({"color": FRAMEWORK_COLORS[framework], "linestyle": dashes})
        seen[framework] += 1
    return styles


def draw_losses(curves: Sequence[LossCurve]) -> Figure:
    """Draw all losses, and below them their relative difference from the oracle, with the limit."""
    columns = 2 if max(len(curve.name) for curve in curves) < 36 else 1
    figure = new_figure(WIDTH_INCHES, 4.4 + 0.16 * (len(curves) / columns + 1))
    above, below = figure.subplots(2, 1, sharex=True)
    # A wide pale line under those that should lie on it.
    oracles = sorted({(curve.first_step, curve.oracle) for curve in curves if curve.oracle})
    for first, oracle in oracles:
        steps, label = range(first, first + len(oracle)), "" if above.lines else "oracle"
        above.plot(steps, oracle, color=ORACLE_COLOR, linewidth=5, alpha=0.45, label=label)
    for curve, style in zip(curves, line_styles([c.framework for c in curves]), strict=True):
        steps = range(curve.first_step, curve.first_step + len(curve.losses))
        above.plot(steps, curve.losses, **style, linewidth=1.5, label=curve.name)
        if curve.differences:
            # The same double has no place on a logarithmic axis: it stands at half of the smallest
            # possible difference.
            shown = [max(each, sys.float_info.epsilon / 2) for each in curve.differences]
            below.plot(steps, shown, **style, linewidth=1.5)
    for limit in sorted({curve.limit for curve in curves if curve.differences}):
        below.axhline(limit, color=RANGE_COLOR, linewidth=0.9)
        below.annotate(f"limit {limit:g}", (curves[0].first_step, limit), va="bottom")
    below.margins(y=0.12)  # room for the words at the limit
    above.set_ylabel("loss per token")
    log_y(below)
    below.set_ylabel("relative difference\nfrom the oracle")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=columns, handlelength=5, frameon=False)
    return figure


def draw_throughput(collection: Collection) -> Figure:
    """Draw a bar per measured row, with its steps' 10th to 90th percentile; pale if not ranked."""
    rows = [row for row in collection.rows if row.tokens_per_second and row.step_ms_median]
    figure = new_figure(WIDTH_INCHES, 0.26 * len(rows) + 0.7)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        speed, alpha = row.tokens_per_second or 0.0, 1.0 if row.ranked else 0.3
        axes.barh(place, speed, color=FRAMEWORK_COLORS[row.framework], alpha=alpha)
        axes.plot(row.throughput_range, [place, place], color=RANGE_COLOR, linewidth=1.5)
        beside = axes.get_yaxis_transform()  # x: a share of the axes' width
        axes.text(1.01, place, f"{speed:,.0f}", transform=beside, va="center")
    one_device = len({row.device for row in rows}) < 2
    names = [row.name if one_device else f"{row.name}, {row.device}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row above
    axes.set_xlabel("tokens/s, with the 10th to 90th percentile of the steps")
    return figure


def draw_time_split(collection: Collection) -> Figure:
    """Draw every stage's mean step time, stacked by its parts."""
    bars = [
        (f"{row.name}, stage {device}", time)
        for row, group in collection.pairs
        if group.timing
        for device, time in group.timing.stages.items()
    ]
    figure = new_figure(WIDTH_INCHES, 0.22 * len(bars) + 1.0)
    axes = figure.subplots()
    for place, (_, time) in enumerate(bars):
        left = 0.0
        for part, color in PART_COLORS.items():
            width = float(getattr(time, part.replace(" ", "_"))) * 1e3
            axes.barh(place, width, left=left, color=color, label=part if place == 0 else None)
            left += width
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("ms of the mean step")
    figure.legend(loc="outside lower right", ncols=len(PART_COLORS), frameon=False)
    return figure


def draw_sweep(curves: Sequence[Curve]) -> Figure:
    """Draw throughput over the swept axis; the ideal is dotted, the knee has a ring."""
    figure = new_figure(WIDTH_INCHES, 3.8 + 0.09 * len(curves))
    axes = figure.subplots()
    for curve, style in zip(curves, line_styles([c.framework for c in curves]), strict=True):
        color = style["color"]
        speed = curve.tokens_per_second
        axes.plot(curve.x, speed, **style, marker="o", markersize=4, label=curve.name)
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        if curve.ideal:
            axes.plot(curve.x, curve.ideal, ":", color=color, linewidth=1)
        if curve.knee is not None:
            at = speed[curve.x.index(curve.knee)]
            axes.plot([curve.knee], [at], "o", markersize=11, fillstyle="none", color=color)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for curve in curves for x in curve.x})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(curves[0].axis.replace("_", "-"))
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title("dotted: the first point scaled by the ideal; ring: the knee")
    figure.legend(loc="outside lower left", ncols=2, handlelength=5, frameon=False)
    return figure
