"""Play a schedule through: every device takes its actions in order, each waits for its message.

The simulator (which wants the times) and the validator (which wants to know whether all devices
reach the end) use this one loop:

    [1] take a device that can go on, and follow its list
    [2] an action whose sender has not run yet: leave the device waiting for that sender
    [3] otherwise run it: start = max(end of the previous action, arrival of the message)
    [4] its own message leaves, when those before it have: a device has one line out
    [5] wake the devices that waited for this action

A waiting device is looked at again only when its sender has run, so every action is run once and
waited for at most once: linear cost. When [1] finds no device, all are done, or those that are not
wait for one another: a deadlock. The order in which [1] takes devices does not change any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.schedule.table import IntArray, Table


@dataclass(frozen=True)
class Played:
    """Start and end of every row (-1 if it never ran), when its message has left, and the row that
    each device stands at.

    A device that is done stands at its `bounds[d + 1]`.
    """

    start: list[float]  # (n,)
    end: list[float]  # (n,)
    left: list[float]  # (n,)
    reached: list[int]  # (p,)


def play(
    table: Table,
    durations: Sequence[float],
    delays: Sequence[float],
    source: IntArray | None = None,
    transmissions: Sequence[float] | None = None,
) -> Played:
    """Run the table.

    `durations` (n,) are of the rows, `delays` (n,) of the messages that rows wait for; both in one
    unit. Sending takes the sender no time, but its line is busy for the `transmissions` (n,) of its
    rows' messages, one after the other (0 by default). `source` (n,) replaces `Table.awaited`.
    """
    # Lists: the loop below reads single numbers, which costs an array ten times as much.
    sources = (table.awaited if source is None else source).tolist()
    bounds = table.bounds.tolist()
    start, end = [-1.0] * table.num_rows, [-1.0] * table.num_rows
    left = end if transmissions is None else [-1.0] * table.num_rows
    reached = bounds[:-1]
    clock, line = [0.0] * len(reached), [0.0] * len(reached)
    waiting: dict[int, list[int]] = {}  # sender's row: devices
    runnable = list(range(len(reached)))
    while runnable:
        device = runnable.pop()  # [1]
        row, now, stop = reached[device], clock[device], bounds[device + 1]
        while row < stop:
            sender = sources[row]
            if sender >= 0:
                sent = left[sender]
                if sent < 0:  # [2]
                    waiting.setdefault(sender, []).append(device)
                    break
                arrival = sent + delays[row]
                if arrival > now:  # `max` would take twice as long
                    now = arrival
            start[row] = now  # [3]
            now += durations[row]
            end[row] = now
            if transmissions is not None:  # [4]
                left[row] = line[device] = max(line[device], now) + transmissions[row]
            if row in waiting:  # [5]
                runnable += waiting.pop(row)
            row += 1
        reached[device], clock[device] = row, now
    return Played(start, end, left, reached)
