"""A simulated schedule as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from common.schedule.action import Op
from common.schedule.simulate import Simulation

MICROSECONDS_PER_UNIT = 1000.0
"""One unit of the costs is shown as a millisecond."""

_COLORS = {Op.F: "thread_state_running", Op.B: "thread_state_iowait", Op.W: "good", Op.BW: "rail_idle"}


def chrome_trace(simulation: Simulation) -> dict[str, Any]:
    """The trace: one process, one thread per device, one complete event per action."""
    schedule, table = simulation.schedule, simulation.table
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": f"{schedule.name}, simulated"}}
    ]
    for device in range(schedule.num_devices):
        name = {"name": f"device {device}"}
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": device, "args": name})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": device, "args": {"sort_index": device}})
    for row in range(table.num_rows):
        action, device = table.action(row), int(table.device[row])
        events.append(
            {
                "name": str(action),
                "cat": action.op.value,
                "ph": "X",
                "pid": 0,
                "tid": device,
                "ts": float(simulation.start[row]) * MICROSECONDS_PER_UNIT,
                "dur": float(simulation.end[row] - simulation.start[row]) * MICROSECONDS_PER_UNIT,
                "cname": _COLORS[action.op],
                "args": {
                    "micro_batch": action.micro_batch,
                    "chunk": action.chunk,
                    "virtual_stage": schedule.virtual_stage(device, action.chunk),
                },
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
