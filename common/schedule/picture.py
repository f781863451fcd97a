"""A simulated schedule as a picture (PNG or SVG): devices downwards, time to the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.io.figure import new_figure
from common.schedule.action import Op, Schedule
from common.schedule.simulate import Simulation
from common.schedule.table import OPS
from common.schedule.why import critical_path

COLORS = {Op.F: "#7eb0d5", Op.B: "#ffb55a", Op.W: "#8bd3a0", Op.BW: "#fd8f6a"}
MEANINGS = {Op.F: "forward", Op.B: "backward, input", Op.W: "backward, weights", Op.BW: "backward"}
FRAME: dict[str, Any] = {"facecolor": "none", "edgecolor": "#202020", "linewidth": 1.6}
MAX_LABELS = 1500
INCHES_PER_ACTION = 0.32
"""Width of the shortest action, unless the whole would exceed MAX_WIDTH_INCHES."""
MAX_WIDTH_INCHES, MIN_WIDTH_INCHES = 24.0, 6.0
POINTS_PER_CHARACTER = 4.6
LABEL_POINTS = 7.5


def draw_picture(simulation: Simulation, path: str | Path, why: bool = False) -> None:
    """Write the chart to `path`, which ends in .png or .svg. Later chunks are paler.

    With `why`, the critical path has a dark frame.
    """
    schedule = simulation.schedule
    peak = max(simulation.peak_in_flight_per_stage)
    title = f"{_size(schedule)}, bubble {simulation.bubble_fraction:.1%}, {peak:g} in flight"
    draw_pictures({title: simulation}, path, why=why)


def draw_pictures(
    charts: Mapping[str, Simulation],
    *paths: str | Path,
    time_label: str = "time",
    why: bool = False,
) -> Figure:
    """Write charts to every path, one below the other with titles and one common time axis.

    Return the figure: one axes a chart, whose first collection is its actions in the table's order.
    """
    simulations = list(charts.values())
    makespan = max(simulation.makespan for simulation in simulations)
    # Wide enough for a label in the shortest action, up to the widest that a page takes.
    room = max(sim.makespan / _shortest(sim) for sim in simulations) * INCHES_PER_ACTION
    width = min(max(room, MIN_WIDTH_INCHES), MAX_WIDTH_INCHES)
    heights = [0.34 * simulation.schedule.num_devices + 0.3 for simulation in simulations]
    figure = new_figure(width + 1, sum(heights) + 0.8)
    rows = figure.subplots(len(charts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, simulation) in zip(rows, charts.items(), strict=True):
        _draw(axes, simulation, width * 72 / makespan, why)
        axes.set_title(title, fontsize=10)
    rows[-1].set_xlim(0, makespan)
    rows[-1].set_xlabel(time_label)
    used = [
        op
        for code, op in enumerate(OPS)
        if any((sim.table.op == code).any() for sim in simulations)
    ]
    keys = [Patch(color=COLORS[op], label=f"{op.value}  {MEANINGS[op]}") for op in used]
    if any(simulation.schedule.num_chunks > 1 for simulation in simulations):
        keys.append(Patch(color=_tone(COLORS[Op.F], 1, 2), label="paler: a later chunk"))
    if why:
        keys.append(Patch(label="critical path", **FRAME))
    figure.legend(
        handles=keys, loc="outside lower right", ncols=len(keys), frameon=False, fontsize=8
    )
    for path in paths:
        figure.savefig(path, dpi=130)
    return figure


def _draw(axes: Axes, simulation: Simulation, points_per_unit: float, why: bool) -> None:
    schedule, table = simulation.schedule, simulation.table
    axes.set_facecolor("#f2f2f2")
    top, bottom = table.device - 0.46, table.device + 0.46
    # Two that overlap are one box in two halves: the first above, the second below.
    start, end = simulation.start, simulation.end.copy()
    bottom[table.leads] = top[table.leads + 1] = table.device[table.leads]
    end[table.leads] = end[table.leads + 1]
    corners = np.stack(
        [
            np.stack([start, top], 1),
            np.stack([end, top], 1),
            np.stack([end, bottom], 1),
            np.stack([start, bottom], 1),
        ],
        axis=1,
    )  # (n, 4, 2)
    tones = np.array(
        [
            [_tone(COLORS[op], chunk, schedule.num_chunks) for chunk in range(schedule.num_chunks)]
            for op in OPS
        ]
    )
    few = table.num_rows <= MAX_LABELS
    edge = "white" if few else "none"
    axes.add_collection(
        PolyCollection(
            list(corners), facecolors=tones[table.op, table.chunk], edgecolors=edge, linewidths=0.8
        )
    )
    if why:
        axes.add_collection(PolyCollection(list(corners[critical_path(simulation)]), **FRAME))
    if few:
        for row in range(table.num_rows):
            # The colour says the operation, so the micro-batch is all that a label has to say.
            text = str(int(table.micro_batch[row]) + schedule.first_micro_batch)
            if len(text) * POINTS_PER_CHARACTER < (end[row] - start[row]) * points_per_unit:
                axes.text(
                    (start[row] + end[row]) / 2,
                    (top[row] + bottom[row]) / 2,
                    text,
                    ha="center",
                    va="center",
                    fontsize=LABEL_POINTS,
                )
    axes.set_ylim(schedule.num_devices - 0.5, -0.5)
    axes.set_yticks(
        range(schedule.num_devices), [f"device {d}" for d in range(schedule.num_devices)]
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _shortest(simulation: Simulation) -> float:
    spent = simulation.end - simulation.start
    return float(spent[spent > 0].min()) if (spent > 0).any() else 1.0


def _size(schedule: Schedule) -> str:
    return (
        f"{schedule.name}: {schedule.num_devices} stages, {schedule.num_micro_batches} "
        "micro-batches"
    )


def _tone(color: str, chunk: int, num_chunks: int) -> tuple[float, float, float]:
    """The colour, mixed with white: not at all for chunk 0, by more than half for the last."""
    white = 0.55 * chunk / max(num_chunks - 1, 1)
    red, green, blue = to_rgb(color)
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white
