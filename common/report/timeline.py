"""The actions of a run's median step and the simulated ones: pictures and a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from common.io.edges import write_file
from common.report.names import framework_name
from common.report.result import RunResult
from common.report.timing import executed, executed_schedule, simulated
from common.schedule.picture import draw_pictures
from common.schedule.simulate import Simulation
from common.schedule.trace import chrome_traces

PICTURES = ("timeline.png", "timeline.svg")
TRACE = "trace.json"


def timelines(result: RunResult) -> dict[str, Simulation]:
    """Return, by title, the executed median step, and its schedule with median costs.

    Times are in milliseconds. Empty for a run without a record of its actions.
    """
    events, config, timing = result.median_step_events, result.config, result.timing
    if not events or not all(events.values()) or timing is None:
        return {}
    schedule = executed_schedule(
        events, config.schedule_name, config.train.micro_batches, config.chunks, timing.placement
    )
    charts = {"measured": executed(schedule, events), "simulated": simulated(schedule, timing)}
    name = framework_name(config)
    return {_title(name, kind, chart, result.shares_gpu): chart for kind, chart in charts.items()}


def draw_timelines(charts: Mapping[str, Simulation], folder: Path | None) -> Figure:
    """Return the picture; write it into `folder` as PNG and SVG, beside `trace.json`."""
    label = "ms since the step's first action"
    if folder is None:
        return draw_pictures(charts, time_label=label)
    write_file(folder / TRACE, json.dumps(chrome_traces(charts)))
    return draw_pictures(charts, *(folder / name for name in PICTURES), time_label=label)


def hints(simulation: Simulation) -> list[str]:
    """Return each action of a picture in words, in the order in which it is drawn."""
    table, found = simulation.table, []
    for row in range(table.num_rows):
        start, end = float(simulation.start[row]), float(simulation.end[row])
        place = f"{table.action(row)} on device {table.device[row]}"
        found.append(f"{place}: {start:.2f} to {end:.2f} ms ({end - start:.2f} ms)")
    return found


def _title(framework: str, kind: str, chart: Simulation, shares_gpu: bool) -> str:
    bubble = "stages share a GPU" if shares_gpu else f"bubble {chart.bubble_fraction:.1%}"
    return f"{framework} {chart.schedule.name}, {kind}: {chart.makespan:,.0f} ms, {bubble}"
