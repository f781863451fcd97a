"""`python -m tests.campaigns.make_readme`: the picture and the table of README.md and
README.zh-CN.md, from results/example.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.io.edges import write_file
from common.report.collect import collect
from common.report.tables import markdown_table
from common.report.timeline import timelines
from common.schedule.picture import draw_pictures
from common.schedule.simulate import Costs, simulate
from common.spec.run import FRAMEWORKS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "results" / "example"
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
LEFT_OUT = (
    "stages",
    "micro-batches",
    "status",
    "first step s",
    "verdict",
    "held-out loss",
    "sim. step",
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
    charts = {
        "the schedule: 1f1b, 2 stages, 8 micro-batches": simulate(
            schedule, Costs.uniform(2, *[unit] * 3)
        )
    }
    charts |= {
        f"{name}, measured: {chart.makespan:,.0f} ms": chart for name, chart in measured.items()
    }
    draw_pictures(
        charts,
        ROOT / "docs" / "images" / "overview.png",
        time_label="ms since the step's first action",
    )


def table() -> str:
    """Return the report's table without `LEFT_OUT`."""
    rows = [
        line.strip("|").split("|") for line in markdown_table(collect([EXAMPLE]).rows).splitlines()
    ]
    kept = [i for i, title in enumerate(rows[0]) if title.strip() not in LEFT_OUT]
    return "\n".join("|" + "|".join(row[i] for i in kept) + "|" for row in rows)


def main() -> None:
    """Make the picture, and put the table between its marks in both pages."""
    picture()
    made = table()
    for page in PAGES:
        marked = r"(<!-- made: table -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            marked,
            lambda match: match[1] + made + "\n" + match[2],
            page.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        if found != 1:
            raise SystemExit(f"{page}: {found} tables between marks; expected 1")
        write_file(page, text)


if __name__ == "__main__":
    main()
