"""A schedule with times, as charts in papers and blogs give it.

Two text forms. A Markdown chart, with a time in every row and a device in every column (or the
other way round); an action lasts to the next row, and the same action in neighbouring rows is one
longer action:

    | t | GPU0 | GPU1 |
    | --- | --- | --- |
    | 0 | F1 | |
    | 1 |  | F1 |

And the text form of schedules with start and end after every action:

    0: F0@0-1 BW0@4-6
    1: F0@1-2 BW0@2-4
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.schedule.action import (
    Action,
    Schedule,
    ScheduleError,
    build_schedule,
    parse_schedule,
    parse_word,
)
from common.schedule.pytorch_csv import is_csv, parse_csv

# Bounded, and only from a word's beginning, so that a long word does not take quadratic time.
_TIMED = re.compile(
    r"(?<!\w)(?P<action>\w{1,16}(?:\.\d{1,9})?|\([\w.]{1,26}&[\w.]{1,26}\))"
    r"@(?P<start>\d+(?:\.\d+)?)-(?P<end>\d+(?:\.\d+)?)",
    re.ASCII,
)


@dataclass(frozen=True)
class Timetable:
    """`spans[d][n]` is (start, end) of the action `schedule.devices[d][n]`; actions are in order of
    their start.
    """

    schedule: Schedule
    spans: tuple[tuple[tuple[float, float], ...], ...]
    tolerance: float = 1e-9
    """How much too early an action may start, for rounding."""

    def times(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (starts, ends) of all actions, device 0 first."""
        flat = np.array([span for row in self.spans for span in row], np.float64).reshape(-1, 2)
        return flat[:, 0], flat[:, 1]


_Word = tuple[Action, ...]
"""An action, or two that overlap."""
_TimedRow = list[tuple[float, float, _Word]]


def read_table(text: str, name: str = "file") -> Schedule | Timetable:
    """Read any form: a schedule's text or CSV, a schedule with times, or a Markdown chart.

    Raises ScheduleError.
    """
    lines = [line.strip() for line in text.splitlines()]
    if any(line.startswith("|") for line in lines):
        return _parse_chart([line for line in lines if line.startswith("|")], name)
    if any("@" in line.split("#", 1)[0] for line in lines):
        return _parse_timed(text, name)
    return parse_csv(text, name) if is_csv(text) else parse_schedule(text, name)


def read_schedule(text: str, name: str = "file") -> Schedule:
    """Read the order alone, whatever form it is in. Raises ScheduleError."""
    table = read_table(text, name)
    return table.schedule if isinstance(table, Timetable) else table


def _build(rows: list[_TimedRow], name: str, untimed: Schedule | None = None) -> Timetable:
    """Put the rows in order of their start; all but their order is `untimed`'s, if given."""
    rows = [sorted(row, key=lambda timed: timed[:2]) for row in rows]
    spans = tuple(tuple((start, end) for start, end, word in row for _ in word) for row in rows)
    actions = [[action for _, _, word in row for action in word] for row in rows]
    if untimed is None:
        return Timetable(build_schedule(actions, name), spans)
    return Timetable(replace(untimed, devices=tuple(map(tuple, actions))), spans)


def _parse_timed(text: str, name: str) -> Timetable:
    # The order and the header are read as the untimed form is; only the times are taken out before.
    without = parse_schedule(_TIMED.sub(lambda match: match["action"], text), name)
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    lines = (line for line in lines if line and not line.startswith("placement"))
    rows: list[_TimedRow] = []
    for device, line in enumerate(lines):
        actions = iter(without.devices[device])
        row: _TimedRow = []
        for text_of_word in line.rpartition(":")[2].split():
            match = _TIMED.fullmatch(text_of_word)
            if match is None:
                raise ScheduleError(
                    f"device {device}: {text_of_word!r} has no times; expected F0@0-1 for every "
                    "action"
                )
            start, end = float(match["start"]), float(match["end"])
            if end < start:
                raise ScheduleError(f"device {device}: {text_of_word} ends before it starts")
            word = tuple(itertools.islice(actions, 2 if "&" in match["action"] else 1))
            row.append((start, end, word))
        rows.append(row)
    return _build(rows, name, without)


def _parse_chart(lines: list[str], name: str) -> Timetable:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    if len(cells) < 2:
        raise ScheduleError("chart: no row below the header; expected one for every time")
    width = len(cells[0])
    for row in cells:
        if len(row) != width:
            raise ScheduleError(
                f"chart: row {row[0]!r} has {len(row)} columns; the header has {width}"
            )
    if not _is_number(cells[1][0]):
        cells = [list(column) for column in zip(*cells, strict=True)]
    times = [_time(row[0]) for row in cells[1:]]
    if times != sorted(set(times)):
        raise ScheduleError(f"chart: the times {times} do not increase")
    last = times[-1] - times[-2] if len(times) > 1 else 1.0
    ends = [*times[1:], times[-1] + last]
    rows: list[_TimedRow] = [[] for _ in cells[0][1:]]
    for device, timed in enumerate(rows):
        running: dict[_Word, int] = {}
        for line, start, end in zip(cells[1:], times, ends, strict=True):
            now: dict[_Word, int] = {}
            for text in re.split(r"[\s,;]+", line[1 + device]):
                if text in ("", "-", "·", "."):
                    continue
                word = _parse_cell(text, line[0])
                if word in running and word not in now:
                    timed[running[word]] = (timed[running[word]][0], end, word)
                    now[word] = running[word]
                else:
                    now[word] = len(timed)
                    timed.append((start, end, word))
            running = now
    return _build(rows, name)


def _parse_cell(text: str, time: str) -> _Word:
    try:
        return parse_word(text)
    except ScheduleError as error:
        raise ScheduleError(f"chart, time {time}: {error}") from None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) is not None


def _time(text: str) -> float:
    if not _is_number(text):
        raise ScheduleError(
            f"chart: {text!r} is not a time; expected a number in the first column or row"
        )
    return float(text)
