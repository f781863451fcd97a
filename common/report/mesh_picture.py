"""The mesh of a run, with what travels along each of its axes in one step.

                  stage 0                    stage 1
    replica 0     ┌─ shard 0 ─┐   ───────►   ┌─ shard 0 ─┐     activations, and their gradients back
                  └─ shard 1 ─┘              └─ shard 1 ─┘     shards: sums within every block
                       │ gradients
    replica 1     ┌─ shard 0 ─┐   ...

The numbers are those of the traffic table (`common.spec.traffic`), for each pair of neighbours.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.io.figure import new_figure
from common.spec.mesh import Mesh, Place
from common.spec.run import RunConfig
from common.spec.traffic import traffic_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS_COLORS = {"stages": "#3b7dd8", "replicas": "#e8a33d", "shards": "#d1495b"}
CARRIES = {
    "stages": "activations and their gradients, from stage to stage",
    "replicas": "gradients of parameters, among replicas",
    "shards": "sums within blocks, among shards",
}
MOST = 16
"""Processes: a larger mesh is a picture of dots."""
COLUMN, ROW, GAP, SIDE = 3.4, 0.9, 0.7, 0.5
INCHES = 0.66
"""For each of these units."""


def most_of(configs: Iterable[RunConfig]) -> RunConfig | None:
    """Return the largest run with replicas or shards that can be drawn; None if there is none."""
    found = [
        config
        for config in configs
        if config.executor != "plain" and Mesh.of(config).lines > 1 and Mesh.of(config).size <= MOST
    ]
    return max(found, key=lambda config: Mesh.of(config).size, default=None)


def draw_mesh(config: RunConfig) -> Figure:
    """Draw a box for every process and an arrow for every pair that talks."""
    mesh = Mesh.of(config)
    height = mesh.replicas * (mesh.shards * ROW + GAP)
    width = (mesh.stages - 1) * COLUMN + 3.6
    figure = new_figure(max(5.0, INCHES * width), INCHES * (height + 0.7) + 0.6)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.set_axis_off()
    for stage in range(mesh.stages):
        x, y = _center(mesh, Place(stage, 0))
        axes.text(x, y + 0.7, f"stage {stage}", ha="center", weight="bold")
    for rank in range(mesh.size):
        place = mesh.place(rank)
        x, y = _center(mesh, place)
        words = [f"replica {place.replica}"] * (mesh.replicas > 1)
        words += [f"shard {place.shard}"] * (mesh.shards > 1)
        frame = {"boxstyle": "round", "facecolor": "none", "edgecolor": "#8a8f98"}
        axes.text(x, y, "\n".join(words), ha="center", va="center", bbox=frame)
    # One line for both directions of a pair.
    pairs: collections.Counter[tuple[int, int]] = collections.Counter()
    for (a, b), count in traffic_bytes(config).items():
        pairs[min(a, b), max(a, b)] += count
    for (a, b), count in pairs.items():
        _arrow(axes, mesh, a, b, count)
    used = [axis for axis in CARRIES if getattr(mesh, axis) > 1]
    for axis in used:
        axes.plot([], [], color=AXIS_COLORS[axis], label=CARRIES[axis])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)
    axes.set_xlim(-1.8, width - 1.8)
    axes.set_ylim(0.9 - height, 1.0)
    return figure


def _center(mesh: Mesh, place: Place) -> tuple[float, float]:
    row = place.replica * (mesh.shards * ROW + GAP) + place.shard * ROW
    return place.stage * COLUMN, -row


def _arrow(axes: Axes, mesh: Mesh, a: int, b: int, count: int) -> None:
    """One line for both directions, with the bytes of both."""
    one, other, axis = mesh.place(a), mesh.place(b), mesh.axis(a, b)
    (x, y), (u, v) = _center(mesh, one), _center(mesh, other)
    if axis == "stages":
        bend = 0.0 if other.stage - one.stage == 1 else -0.2
        start, end = (x + SIDE, y), (u - SIDE, v)
        label = (x + u) / 2, y + 0.16 - bend * (u - x) / 2
    else:
        # Replicas to the right of their boxes, shards to the left.
        right = 1 if axis == "replicas" else -1
        bend = -0.3 * right
        start, end = (x + right * SIDE, y - 0.1), (u + right * SIDE, v + 0.1)
        # A bent arrow is farthest from its chord by half of `bend` times the chord.
        label = x + right * (SIDE + 0.15 * (y - v) + 0.42), (y + v) / 2 + 0.22
    arrow = {
        "arrowstyle": "<->",
        "color": AXIS_COLORS[axis],
        "connectionstyle": f"arc3,rad={bend}",
        "shrinkA": 1,
        "shrinkB": 1,
    }
    axes.annotate("", end, start, arrowprops=arrow)
    axes.text(*label, f"{count / 1e6:,.3g} MB", ha="center", va="center", color=AXIS_COLORS[axis])
