"""Line charts and timelines as plain numbers in percent, which the HTML template stretches to any
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from common.schedule.simulate import Simulation
from common.schedule.table import OPS

MAX_TIMELINE_ACTIONS = 3000
"""With more, no phone could open the page; the trace file has all of them."""


@dataclass(frozen=True)
class Series:
    """One line. `points` are (x, y); what is not finite is left out."""

    name: str
    color: str
    """A CSS variable."""
    points: Sequence[tuple[float, float]]
    dash: str = ""
    markers: bool = False


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Drawn:
    """A series in a box of 100 x 100."""

    name: str
    color: str
    dash: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LineChart:
    """Ready for the template."""

    lines: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> LineChart:
    """Scale all series to one box. On a logarithmic axis, zeros and less are left out."""
    to_x: Callable[[float], float] = math.log2 if log_x else float
    to_y: Callable[[float], float] = math.log10 if log_y else float
    kept = [
        [
            (to_x(x), to_y(y), x, y)
            for x, y in each.points
            if math.isfinite(y) and (y > 0 or not log_y)
        ]
        for each in series
    ]
    xs = [x for line in kept for x, *_ in line] or [0.0, 1.0]
    ys = [y for line in kept for _, y, *_ in line] or [0.0, 1.0]
    y_low, y_high = (0.0 if from_zero else min(ys)), max(ys)
    if log_y:
        y_low, y_high = math.floor(y_low), math.ceil(max(y_high, y_low + 0.1))
    else:
        margin = 0.05 * ((y_high - y_low) or 1.0)
        y_low, y_high = y_low - (0.0 if from_zero else margin), y_high + margin
    x_low, x_high = min(xs), max(xs)

    def x_at(x: float) -> float:
        return 100 * (x - x_low) / ((x_high - x_low) or 1.0)

    def y_at(y: float) -> float:
        return 100 - 100 * (y - y_low) / ((y_high - y_low) or 1.0)

    lines = tuple(
        Drawn(
            each.name,
            each.color,
            each.dash,
            " ".join(f"{x_at(x):.2f},{y_at(y):.2f}" for x, y, *_ in line),
            tuple(
                (x_at(x), y_at(y), f"{each.name}: {_short(raw_x)}, {_short(raw_y)}")
                for x, y, raw_x, raw_y in line
            )
            if each.markers
            else (),
        )
        for each, line in zip(series, kept, strict=True)
    )
    if log_x:
        x_ticks = tuple(
            Tick(x_at(x), f"{raw:g}")
            for x, raw in sorted({(x, raw) for line in kept for x, _, raw, _ in line})
        )
    else:
        x_ticks = tuple(Tick(x_at(x), _short(x)) for x in _nice(x_low, x_high, whole=True))
    if log_y:
        every = max(1, math.ceil((y_high - y_low) / 8))
        y_ticks = tuple(Tick(y_at(y), f"1e{y}") for y in range(int(y_low), int(y_high) + 1, every))
    else:
        y_ticks = tuple(Tick(y_at(y), _short(y)) for y in _nice(y_low, y_high))
    return LineChart(lines, x_ticks, y_ticks, x_label, y_label)


def _nice(low: float, high: float, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=6, integer=whole).tick_values(low, high)
    return [float(tick) for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---------------------------------------------------------------------------------------- timelines


@dataclass(frozen=True)
class Block:
    """One action of a lane."""

    left: float
    width: float
    op: str
    odd: bool
    """Whether its chunk is an odd one."""
    label: str
    title: str


@dataclass(frozen=True)
class Timeline:
    """The lanes of one chart, one per device, and the ticks of its axis in milliseconds."""

    title: str
    lanes: tuple[tuple[Block, ...], ...]
    ticks: tuple[Tick, ...]


def timeline(title: str, simulation: Simulation, whole: float) -> Timeline | None:
    """Return the chart on an axis of `whole` milliseconds; None with too many actions."""
    table = simulation.table
    if table.num_rows > MAX_TIMELINE_ACTIONS:
        return None
    lanes = []
    for device in range(table.schedule.num_devices):
        lane = []
        for row in range(int(table.bounds[device]), int(table.bounds[device + 1])):
            action, start, end = (
                table.action(row),
                float(simulation.start[row]),
                float(simulation.end[row]),
            )
            lane.append(
                Block(
                    left=100 * start / whole,
                    width=100 * (end - start) / whole,
                    op=OPS[table.op[row]].value,
                    odd=action.chunk % 2 == 1,
                    label=str(action.micro_batch),
                    title=f"{action} on device {device}: {start:.2f} to {end:.2f} ms "
                    f"({end - start:.2f} ms)",
                )
            )
        lanes.append(tuple(lane))
    ticks = tuple(
        Tick(100 * ms / whole, f"{ms:g}")
        for ms in MaxNLocator(nbins=10).tick_values(0, whole)
        if 0 <= ms <= whole
    )
    return Timeline(title, tuple(lanes), ticks)
