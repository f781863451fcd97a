"""The report as one HTML file that needs no network: styles, script and pictures are inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from common.io.edges import write_file
from common.io.figure import inline_svg
from common.report.collect import Collection, Run
from common.report.facts import facts, parity_verdict
from common.report.plots import FRAMEWORK_COLORS, RANGE_COLOR
from common.report.sections import Section
from common.report.timeline import TRACE, draw_timelines, hints, timelines

SHOWN_ELSEWHERE = ("version", "bubble / sim.", "sim. step", "peak MB", "held MB")
"""Columns of the table that the page has in a section of their own."""
MAX_ACTIONS = 3000
"""Of one chart in the page: with more, no phone could open it; the files have all of them."""
LABEL_COLOR = "#14171c"
"""Of letters on coloured blocks, which stays in dark mode."""
THEMED = {color: name for name, color in FRAMEWORK_COLORS.items()}
THEMED |= {"#ffffff": "card", "#000000": "ink", RANGE_COLOR: "ink", "#f2f2f2": "stripe"}
"""Colours of the pictures that the page sets anew in dark mode."""


def write_html(
    collection: Collection, sections: Sequence[Section], figures: Mapping[str, Figure], path: Path
) -> None:
    """Write the whole report to `path`, and the timelines that it shows into the runs' folders."""
    environment = Environment(
        loader=PackageLoader("common.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [(row.name, group.shown) for row, group in collection.pairs if group.shown]
    page = environment.get_template("report.html.j2").render(
        preset=collection.results[0].preset,
        machine=collection.results[0].machine.one_line,
        verdict=parity_verdict(collection),
        problems=collection.problems,
        sections=sections,
        shown_elsewhere=SHOWN_ELSEWHERE,
        label_color=LABEL_COLOR,
        pictures={name: inline_svg(figure, THEMED) for name, figure in figures.items()},
        timelines=[drawn for name, run in shown if (drawn := _timeline(name, run, path.parent))],
        facts=facts(collection),
        environments=_environments(collection),
    )
    write_file(path, page)


def _timeline(name: str, run: Run, home: Path) -> dict[str, Any] | None:
    """The picture that `draw_timelines` makes, with words to point at, and fit to be stretched."""
    charts = timelines(run.result)
    if not charts:
        return None
    # What a benchmark in another folder has already is left as it is.
    is_due = run.folder.parent == home or not (run.folder / TRACE).exists()
    figure = draw_timelines(charts, run.folder if is_due else None)
    folder = Path(os.path.relpath(run.folder, home)).as_posix()
    if max(chart.table.num_rows for chart in charts.values()) > MAX_ACTIONS:
        return {"name": name, "folder": folder, "svg": ""}
    for legend in figure.legends:  # the page has one
        legend.remove()
    figure.set_layout_engine("constrained", w_pad=0.12)  # inches, for letters beside a narrow one
    for axes in figure.axes:
        axes.collections[0].set_gid("titled")
        devices = [str(round(place)) for place in axes.get_yticks()]
        axes.set_yticks(axes.get_yticks(), devices)
        for label in axes.texts:
            label.set_color(LABEL_COLOR)
    # In the order in which Matplotlib draws: chart by chart, action by action.
    titles = [hint for chart in charts.values() for hint in hints(chart)]
    height = 96 * float(figure.get_size_inches()[1])  # in CSS pixels
    # Stretched to any width by the page's script, which then narrows the letters again.
    svg = inline_svg(figure, THEMED, titles).replace(
        "<svg ", f'<svg preserveAspectRatio="none" style="height: {height:.0f}px" ', 1
    )
    return {"name": name, "folder": folder, "svg": svg}


def _environments(collection: Collection) -> list[tuple[str, str]]:
    """Every distinct environment as the worker read it back, with the rows' framework."""
    found: dict[str, str] = {}
    for row, group in collection.pairs:
        if group.trained and group.trained.environment:
            text = json.dumps(group.trained.environment, indent=1, default=str)
            executor = "" if row.executor == "table" else f" {row.executor}"
            found.setdefault(text, row.framework_name + executor)
    return [(name, text) for text, name in found.items()]
