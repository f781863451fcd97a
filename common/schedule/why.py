"""Why a step takes as long as it does: what every idle gap waits for, and the critical path.

    device 0 F0*F1 ·  ·  BW0── ·  BW1──*       the gap of device 0 from 2 to 4: BW0 waits for BW0
    device 1 ·  F0*BW0──*F1*BW1──*·  ·         of device 1; `*` marks the critical path

An action starts late for one reason only: the message that it waits for (`Table.awaited`). So a gap
has one cause, and one chain of such causes leads from the end of the step back to its beginning:
shorten an action on it, and the step may be shorter; shorten another, and it is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from common.schedule.simulate import Simulation


@dataclass(frozen=True, slots=True)
class Gap:
    """Time in which a device does nothing."""

    device: int
    start: float
    end: float
    cause: str

    def __str__(self) -> str:
        return f"device {self.device} is idle from {self.start:g} to {self.end:g}: {self.cause}"


def gaps(simulation: Simulation) -> list[Gap]:
    """Return every idle gap, by device and time, up to the makespan."""
    return [
        gap
        for device in range(simulation.schedule.num_devices)
        for gap in _gaps_of(simulation, device)
    ]


def _gaps_of(simulation: Simulation, device: int) -> Iterator[Gap]:
    table, start, end = simulation.table, simulation.start, simulation.end
    # Up to here the device has been busy, or its gaps are told.
    done = 0.0
    for row in range(int(table.bounds[device]), int(table.bounds[device + 1])):
        # It can only be a message that is late: the device is free, and what an action needs from
        # its own device stands earlier in the list.
        if start[row] > done + _rounding(simulation):
            waiting, sender = _awaited(simulation, row)
            sent = f"{table.label(sender)} of device {table.device[sender]}"
            cause = f"{table.action(waiting)} waits for {sent}, which ends at {end[sender]:g}"
            if delay := simulation.delay[sender]:
                cause += f"; its message takes {delay:g}"
            yield Gap(device, done, float(start[row]), cause)
        done = float(end[row])
    if simulation.makespan > done + _rounding(simulation):
        last = int(end.argmax())
        cause = f"nothing is left to do; the last is {table.label(last)} of device "
        yield Gap(device, done, simulation.makespan, cause + str(table.device[last]))


def _awaited(simulation: Simulation, first: int) -> tuple[int, int]:
    """Return the row that waits and the one whose message it waits for; `first` starts late.

    Of two that overlap that is the one whose message comes last: they start together.
    """
    table = simulation.table
    together = first + 1 < table.num_rows and table.overlaps[first + 1]
    pairs = [
        (row, int(table.awaited[row])) for row in ([first, first + 1] if together else [first])
    ]
    received = [pair for pair in pairs if pair[1] >= 0]
    return max(received, key=lambda pair: simulation.end[pair[1]] + simulation.delay[pair[1]])


def critical_path(simulation: Simulation) -> list[int]:
    """Return the rows, from the first in time to the last, that leave one another no slack.

    Each begins when the one before it ends or its message arrives; of both at once, the action
    before it on its device is taken. The second of two that overlap stands for both.
    """
    table, start, end = simulation.table, simulation.start, simulation.end
    row = int(end.argmax())
    path = [row]
    while start[row] > _rounding(simulation):
        # Backwards from the action that ends last. In the chart above: BW1 of device 0 began when
        # BW1 of device 1 had ended, that one when F1 before it had ended, and so on to F0.
        first = row - int(table.overlaps[row])
        follows = first > table.bounds[table.device[row]]
        if follows and end[first - 1] >= start[row] - _rounding(simulation):
            row = first - 1
        else:
            row = _awaited(simulation, first)[1]
        path.append(row)
    return path[::-1]


def explain_gaps(simulation: Simulation) -> str:
    """Return the critical path in one line and every gap in another."""
    table, runs = simulation.table, []
    for device, rows in itertools.groupby(
        critical_path(simulation), lambda row: int(table.device[row])
    ):
        names = [table.label(row) for row in rows]
        between = " ... " if len(names) > 2 else " "
        runs.append(f"{between.join(dict.fromkeys((names[0], names[-1])))} on device {device}")
    path = f"critical path (*), {simulation.makespan:g} long: {', '.join(runs)}"
    return "\n".join([path, *map(str, gaps(simulation))])


def _rounding(simulation: Simulation) -> float:
    """How far apart two times may be that are the same but for rounding."""
    return 1e-9 * simulation.makespan
