"""Plays a schedule through: every device takes its actions in order, and each waits for the message it needs.

Both the simulator (which wants the times) and the validator (which wants to know whether everybody arrives) use this
one loop. A device that waits is woken by the action it waits for, so every action is looked at once: linear cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.schedule.table import IntArray, Table


@dataclass(frozen=True)
class Played:
    """Start and end of every row (-1 where it never came to it), and the row that each device stands at."""

    start: list[float]  # (n,)
    end: list[float]  # (n,)
    reached: list[int]  # (p,)


def play(table: Table, durations: Sequence[float], delays: Sequence[float], source: IntArray | None = None) -> Played:
    """Runs the table. `durations` (n,) per row; `delays` (n,) is what the message that a row waits for takes on its way.

    start = max(end of the device's previous action, end of the sender + delay); sending takes the sender no time.
    `source` (n,) replaces the rows that are waited for.
    """
    sources = (table.source if source is None else source).tolist()
    bounds = table.bounds.tolist()
    start, end = [-1.0] * table.num_rows, [-1.0] * table.num_rows
    reached = bounds[:-1]
    clock = [0.0] * len(reached)
    waiting: dict[int, list[int]] = {}
    runnable = list(range(len(reached)))
    while runnable:
        device = runnable.pop()
        row, now, stop = reached[device], clock[device], bounds[device + 1]
        while row < stop:
            sender = sources[row]
            if sender >= 0:
                sent = end[sender]
                if sent < 0:
                    waiting.setdefault(sender, []).append(device)
                    break
                now = max(now, sent + delays[row])
            start[row] = now
            now += durations[row]
            end[row] = now
            if row in waiting:
                runnable += waiting.pop(row)
            row += 1
        reached[device], clock[device] = row, now
    return Played(start, end, reached)
