"""Everything that a benchmark leaves besides its result files, made from those alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.io.edges import write_file
from common.report import plots, tables
from common.report.baselines import baseline_ratios
from common.report.collect import Collection
from common.report.facts import parity_verdict
from common.report.html import write_html
from common.report.markdown import markdown_report
from common.report.sections import sections
from common.report.sweep import Axis, Curve, curves

AXES: tuple[Axis, ...] = ("micro_batches", "stages", "replicas")


def publish(collection: Collection, folder: Path, sweep: bool = False) -> None:
    """Write report.html, report.md, table.csv, summary.json and pictures into `folder`.

    Timelines and traces go into the results' own folders. `sweep` adds throughput over
    micro-batches, over stages and over replicas, if several of them ran.
    """
    swept = sweeps(collection) if sweep else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "table.csv", tables.csv_table(collection.rows))
    write_file(folder / "summary.json", json.dumps(_summary(collection, swept), indent=1) + "\n")
    figures = plots.pictures(collection, swept)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=plots.DPI)
    shown = sections(collection, swept)
    write_file(folder / "report.md", markdown_report(collection, shown, figures))
    write_html(collection, shown, figures, folder / "report.html")


def sweeps(collection: Collection) -> dict[Axis, list[Curve]]:
    """Return the curves over every axis that has any."""
    return {axis: found for axis in AXES if (found := curves(collection.rows, axis))}


def _summary(collection: Collection, swept: dict[Axis, list[Curve]]) -> dict[str, Any]:
    """The tables for programs; samples and events are in the results."""
    verdict = parity_verdict(collection)
    return {
        "parity": {"good": verdict.good, "text": verdict.text},
        "rows": [
            asdict(row) | {"name": row.name, "verdict": row.verdict} for row in collection.rows
        ],
        "peers": [
            {"ours": each.ours.name, "peer": each.baseline.name, "verdict": each.verdict}
            | asdict(each.ratio)
            for each in baseline_ratios(collection)
        ],
        "sweeps": [
            asdict(curve) | {"knee": curve.knee} for found in swept.values() for curve in found
        ],
    }
