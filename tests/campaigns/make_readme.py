"""`python -m tests.campaigns.make_readme`: the picture and the table of README.md and
README.zh-CN.md, from results/example.
"""

from __future__ import annotations

from pathlib import Path

from common.report.collect import collect
from common.report.tables import grid
from common.report.timeline import timelines
from common.schedule.picture import draw_pictures
from common.schedule.simulate import Costs, simulate
from common.spec.run import FRAMEWORKS
from tests.campaigns.make_schedules import fill

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "results" / "example"
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
LEFT_OUT = (
    *("stages", "micro-batches", "status", "first step s"),
    *("verdict", "held-out loss", "sim. step"),
)
"""Columns that only the whole report has."""


def picture() -> None:
    """1f1b as it is drawn, and as each framework ran it."""
    shown = [group.shown.result for group in collect([EXAMPLE]).groups if group.shown]
    runs = {run.config.framework: run for run in shown if run.config.schedule == "1f1b"}
    measured = {name: next(iter(timelines(runs[name]).values())) for name in FRAMEWORKS}
    schedule = measured[FRAMEWORKS[0]].schedule
    mean = sum(chart.makespan for chart in measured.values()) / len(measured)
    unit = mean / simulate(schedule, Costs.uniform(2)).makespan
    drawn = simulate(schedule, Costs.uniform(2, *[unit] * 3))
    charts = {"the schedule: 1f1b, 2 stages, 8 micro-batches": drawn}
    for name, chart in measured.items():
        charts[f"{name}, measured: {chart.makespan:,.0f} ms"] = chart
    image = ROOT / "docs" / "images" / "overview.png"
    draw_pictures(charts, image, time_label="ms since the step's first action")


def table() -> str:
    """Return the report's table without `LEFT_OUT`."""
    return grid(collect([EXAMPLE]).rows).without(LEFT_OUT).markdown().strip()


def main() -> None:
    """Make the picture, and put the table into both pages."""
    picture()
    for page in PAGES:
        fill("table", table(), page)


if __name__ == "__main__":
    main()
