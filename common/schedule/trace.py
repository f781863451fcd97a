"""Schedules with times as a Chrome trace, for Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.schedule.action import Op
from common.schedule.simulate import Simulation

MICROSECONDS_PER_UNIT = 1000.0
"""One unit of the costs is shown as a millisecond."""

GAP_MICROSECONDS = 0.002
"""How much earlier an event ends: viewers round, and drop events that then overlap."""

LANES, IDS = 1_000, 1_000_000
"""Factors for the numbers of threads and messages: unique in the file, and no thread 0."""

INSIDE = 0.01
"""Arrows start and end this share inside an action: at its edge viewers pick a neighbour."""

_COLORS = {
    Op.F: "thread_state_running",
    Op.B: "thread_state_iowait",
    Op.W: "good",
    Op.BW: "rail_idle",
}


def chrome_trace(simulation: Simulation) -> dict[str, Any]:
    """Return a process with a thread per device, an event per action, and an arrow per message."""
    return chrome_traces({f"{simulation.schedule.name}, simulated": simulation})


def chrome_traces(charts: Mapping[str, Simulation]) -> dict[str, Any]:
    """Return the same with a process for every chart, under its name."""
    events = [
        event
        for pid, (name, simulation) in enumerate(charts.items())
        for event in _events(simulation, name, pid + 1)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(simulation: Simulation, name: str, pid: int) -> list[dict[str, Any]]:
    schedule, table = simulation.schedule, simulation.table
    begin = (simulation.start * MICROSECONDS_PER_UNIT).round(3)  # (n,)
    end = (simulation.end * MICROSECONDS_PER_UNIT).round(3)  # (n,)
    start, duration = begin.tolist(), (end - begin - GAP_MICROSECONDS).clip(min=0).round(3).tolist()
    device = table.device.tolist()
    thread = [LANES * pid + d for d in range(schedule.num_devices)]
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}},
        {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}},
    ]
    for d in range(schedule.num_devices):
        lane = {"ph": "M", "pid": pid, "tid": thread[d]}
        events.append(lane | {"name": "thread_name", "args": {"name": f"device {d}"}})
        events.append(lane | {"name": "thread_sort_index", "args": {"sort_index": d}})
    for row in np.delete(np.arange(table.num_rows), table.leads).tolist():
        action = table.action(row)
        events.append(
            {
                "name": table.label(row),
                "cat": action.op.value,
                "ph": "X",
                "pid": pid,
                "tid": thread[device[row]],
                "ts": start[row],
                "dur": duration[row],
                "cname": _COLORS[action.op],
                "args": {
                    "micro_batch": action.micro_batch,
                    "chunk": action.chunk,
                    "virtual_stage": schedule.virtual_stage(device[row], action.chunk),
                },
            }
        )
    for row, sender in enumerate(table.awaited.tolist()):
        if sender < 0:
            continue
        kind = "activation" if table.action(row).op is Op.F else "gradient"
        arrow = {"name": kind, "cat": "message", "id": pid * IDS + row, "pid": pid}
        leaves = start[sender] + (1 - INSIDE) * duration[sender]
        arrives = start[row] + INSIDE * duration[row]
        # Two threads read clocks: a message may seem to arrive before it left, which viewers drop.
        leaves, arrives = round(min(leaves, arrives), 3), round(arrives, 3)
        events.append(arrow | {"ph": "s", "tid": thread[device[sender]], "ts": leaves})
        events.append(arrow | {"ph": "f", "bp": "e", "tid": thread[device[row]], "ts": arrives})
    return events
