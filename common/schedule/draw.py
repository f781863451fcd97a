"""A schedule as a chart in text, for terminals and documents: devices downwards, time to the right.

>>> from common.schedule.generators import make_schedule
>>> print(draw_text(make_schedule("1f1b", 2, 3)))
time     0  1  2  3  4  5  6  7  8  9  10 11
device 0 F0 F1 ·  ·  BW0── F2 BW1── ·  BW2──
device 1 ·  F0 BW0── F1 BW1── F2 BW2── ·  ·
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.text import Text

from common.schedule.action import Op, Schedule, ScheduleError
from common.schedule.simulate import Costs, Simulation, simulate
from common.schedule.why import critical_path

MAX_COLUMNS = 20_000
STYLES = {Op.F: "black on bright_blue", Op.B: "black on bright_cyan", Op.W: "black on bright_green"}
STYLES[Op.BW] = "black on bright_yellow"
"""One colour per operation; odd chunks are dim."""


@dataclass(frozen=True)
class _Line:
    """A line of the chart with its parts' styles: (first column, last column + 1, style)."""

    text: str
    styles: list[tuple[int, int, str]]


def draw_text(
    schedule: Schedule,
    costs: Costs | None = None,
    width: int | None = None,
    ascii_only: bool = False,
    why: bool = False,
) -> str:
    """Return the chart as plain text; `width` folds it into blocks of at most that many columns.

    `ascii_only` is for terminals that are not UTF-8: those of East Asia draw `·` and `─` two columns wide.

    With `why`, `*` marks the critical path (`common.schedule.why`).

    The times are those of the simulator, by default with F = B = W = 1; `·` is idle. Raises ScheduleError for a schedule
    that cannot run or whose chart would be too wide.
    """  # noqa: E501
    return "\n".join(
        line.text.rstrip()
        for line in _fold(_lines(simulate(schedule, costs), ascii_only, why), width)
    )


def draw_color(
    schedule: Schedule,
    costs: Costs | None = None,
    width: int | None = None,
    ascii_only: bool = False,
    why: bool = False,
) -> Text:
    """Return the same chart in colour, for `rich.print`."""
    picture = Text(no_wrap=True)
    for line in _fold(_lines(simulate(schedule, costs), ascii_only, why), width):
        text = Text(line.text + "\n")
        for first, last, style in line.styles:
            text.stylize(style, first, last)
        picture.append_text(text)
    return picture


def _lines(simulation: Simulation, ascii_only: bool, why: bool) -> list[_Line]:
    marked = set(critical_path(simulation)) if why else set()
    dot, dash = (".", "-") if ascii_only else ("·", "─")
    table, schedule = simulation.table, simulation.schedule
    spent = simulation.end - simulation.start
    shortest = float(spent[spent > 0].min()) if (spent > 0).any() else 1.0
    names = (
        [table.label(row) for row in range(table.num_rows)] if table.num_rows <= MAX_COLUMNS else []
    )
    # The narrowest cell in which every label fits with a space, whatever its action's duration.
    needed = (
        math.ceil((len(n) + 1) * shortest / t)
        for n, t in zip(names, spent.tolist(), strict=False)
        if t > 0
    )
    cell = max(needed, default=1)
    columns = round(simulation.makespan / shortest * cell)
    if not names or columns > MAX_COLUMNS:
        raise ScheduleError(
            f"schedule {schedule.name} has {table.num_rows} actions, too many for text; expected "
            ".png, .svg or .json"
        )
    scale = cell / shortest
    head = "time".ljust(len(f"device {schedule.num_devices - 1}") + 1)
    lines = [_Line(head + "".join(_axis(simulation.makespan, shortest, cell)), [])]
    for device in range(schedule.num_devices):
        prefix = f"device {device}".ljust(len(head))
        idle = (dot.ljust(cell) * (columns // cell + 1))[:columns]
        text, styles = list(prefix + idle), []
        for row in range(int(table.bounds[device]), int(table.bounds[device + 1])):
            first = len(prefix) + round(simulation.start[row] * scale)
            last = len(prefix) + round(simulation.end[row] * scale)
            action = table.action(row)
            # An action fills its cells but the last, which stays free: "BW0── " of 6.
            room = last - first - 1
            word = names[row][:room].ljust(max(room, 0), dash) + ("*" if row in marked else " ")
            text[first:last] = list(word)[: last - first]
            styles.append(
                (first, last - 1, STYLES[action.op] + (" dim" if action.chunk % 2 else ""))
            )
        lines.append(_Line("".join(text), styles))
    return lines


def _axis(makespan: float, unit: float, cell: int) -> Iterator[str]:
    """Times at every n-th cell, n as small as the numbers allow."""
    count = math.ceil(makespan / unit - 1e-9)
    widest = max(len(f"{n * unit:g}") for n in range(count + 1)) + 1
    every = math.ceil(widest / cell)
    for n in range(0, count, every):
        yield f"{n * unit:g}".ljust(cell * every)


def _fold(lines: list[_Line], width: int | None) -> list[_Line]:
    head = lines[0].text.index("0")
    total = max(len(line.text) for line in lines)
    if width is None or total <= width:
        return lines
    room = max(width - head, 20)
    folded: list[_Line] = []
    # Each block has the names at its left; a style is cut where the block begins and ends.
    for begin in range(head, total, room):
        for line in lines:
            styles = [
                (max(first, begin) - begin + head, min(last, begin + room) - begin + head, style)
                for first, last, style in line.styles
                if last > begin and first < begin + room
            ]
            folded.append(_Line(line.text[:head] + line.text[begin : begin + room], styles))
        folded.append(_Line("", []))
    return folded[:-1]
