"""The report as one HTML file that needs no network: styles, script and charts are inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.io.edges import write_file
from common.report import baselines, tables
from common.report.charts import LineChart, Series, Timeline, line_chart, timeline
from common.report.collect import Collection, RowRuns
from common.report.facts import TIMING_LEGEND, facts, parity_verdict, timing_note
from common.report.losses import loss_curves
from common.report.sweep import Axis, Curve
from common.report.tables import Row
from common.report.timeline import timelines
from common.schedule.simulate import Simulation

PARTS = ("compute", "communication_wait", "schedule_wait", "host", "rest")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
SHOWN_ELSEWHERE = ("version", "bubble / sim.", "sim. step", "peak MB", "held MB")
"""Columns of the table that the page has in a section of their own."""


def write_html(collection: Collection, swept: Mapping[Axis, Sequence[Curve]], path: Path) -> None:
    """Write the whole report to `path`."""
    environment = Environment(
        loader=PackageLoader("common.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pairs = list(zip(collection.rows, collection.groups, strict=True))
    page = environment.get_template("report.html.j2").render(
        preset=collection.results[0].preset,
        machine=collection.results[0].machine.one_line,
        verdict=parity_verdict(collection),
        problems=collection.problems,
        tracks=[_track(track, rows) for track, rows in tables.by_track(collection.rows).items()],
        legend=tables.LEGEND,
        baselines=baselines.baseline_ratios(collection),
        baselines_legend=baselines.LEGEND,
        parity=_parity(pairs),
        losses=_loss_charts(collection),
        timing=[
            _timing(row, group) for row, group in pairs if group.shown and group.shown.result.timing
        ],
        timing_note=timing_note(collection).removesuffix(TIMING_LEGEND),
        timing_legend=TIMING_LEGEND,
        timelines=[found for row, group in pairs if (found := _timelines(row, group, path.parent))],
        sweeps=[_sweep(axis, found) for axis, found in swept.items()],
        memory=_memory(pairs),
        facts=facts(collection),
        environments=_environments(collection),
    )
    write_file(path, page)


def _track(track: str, rows: Sequence[Row]) -> dict[str, Any]:
    columns = [column for column in tables.columns_for(rows) if column.title not in SHOWN_ELSEWHERE]
    fastest = max((_speed(row, row.step_ms_p10) for row in rows), default=0.0) or 1.0
    return {
        "name": track,
        "columns": [(column.title, column.numeric) for column in columns],
        "rows": [
            {
                "cells": [column.cell(row) for column in columns],
                "ranked": row.ranked,
                "verdict": row.verdict,
            }
            for row in rows
        ],
        "bars": [
            {
                "name": row.name,
                "framework": row.framework,
                "ranked": row.ranked,
                "value": 100 * row.tokens_per_second / fastest,
                "low": 100 * _speed(row, row.step_ms_p90) / fastest,
                "high": 100 * _speed(row, row.step_ms_p10) / fastest,
                "text": f"{row.tokens_per_second:,.0f}",
            }
            for row in rows
            if row.tokens_per_second and row.step_ms_median
        ],
    }


def _speed(row: Row, step_ms: float | None) -> float:
    """The row's throughput if every step took `step_ms`, in tokens/s; None: what the median takes."""  # noqa: E501
    if not (row.tokens_per_second and row.step_ms_median):
        return 0.0
    return row.tokens_per_second * row.step_ms_median / (step_ms or row.step_ms_median)


def _parity(pairs: Sequence[tuple[Row, RowRuns]]) -> dict[str, Any]:
    """Per row and check the worst error over its limit, over all repeats."""
    found: list[tuple[Row, dict[str, float], str, int]] = []
    for row, group in pairs:
        margins: dict[str, float] = {}
        for result in group.results:
            for check, margin in result.parity.margins.items():
                margins[check] = max(margin, margins.get(check, 0.0))
        reasons = [result.parity.reason for result in group.results if result.parity.reason]
        tensors = max(result.parity.tensors for result in group.results)
        found.append((row, margins, reasons[0] if reasons else "", tensors))
    checks = list(dict.fromkeys(check for _, margins, _, _ in found for check in margins))
    return {
        "checks": [check.replace("_", " ") for check in checks],
        "rows": [
            {
                "name": row.name,
                "status": row.parity or "not run",
                "margins": [
                    f"{margins[check]:.2%}" if check in margins else "" for check in checks
                ],
                "tensors": tensors or "",
                "reason": reason,
            }
            for row, margins, reason, tensors in found
        ],
    }


def _loss_charts(collection: Collection) -> list[LineChart]:
    curves = loss_curves(collection)
    if not curves:
        return []
    lines, apart = [], []
    for number, curve in enumerate(curves):
        color, dash = f"--{curve.framework}", DASHES[number % len(DASHES)]
        lines.append(Series(curve.name, color, list(enumerate(curve.losses)), dash))
        if curve.oracle:
            apart.append(Series(curve.name, color, list(enumerate(curve.differences)), dash))
    for oracle in {curve.oracle: None for curve in curves if curve.oracle}:
        lines.append(
            Series("oracle (dots)", "--ink", list(enumerate(oracle)), "0 1000", markers=True)
        )
    steps = max(len(curve.losses) for curve in curves)
    for limit in sorted({curve.limit for curve in curves if curve.oracle}):
        apart.append(Series(f"limit {limit:g}", "--bad", [(0, limit), (steps - 1, limit)]))
    charts = [line_chart(lines, "step", "loss per token")]
    if apart:
        charts.append(
            line_chart(apart, "step", "relative difference from the oracle (log)", log_y=True)
        )
    return charts


def _timing(row: Row, group: RowRuns) -> dict[str, Any]:
    assert (
        group.shown is not None and group.shown.result.timing is not None
    )  # the caller has looked
    timing = group.shown.result.timing
    return {
        "name": row.name,
        "timing": timing,
        "near": abs(timing.step_difference) <= 0.05,
        "stages": [
            {
                "device": device,
                "total_ms": time.total * 1e3,
                "parts": [
                    (part, 100 * getattr(time, part) / time.total, getattr(time, part) * 1e3)
                    for part in PARTS
                ],
            }
            for device, time in timing.stages.items()
        ],
    }


def _timelines(row: Row, group: RowRuns, home: Path) -> dict[str, Any] | None:
    charts: dict[str, Simulation] = timelines(group.shown.result) if group.shown else {}
    if not charts or group.shown is None:
        return None
    whole = max(chart.makespan for chart in charts.values())
    drawn: list[Timeline | None] = [
        timeline(title, chart, whole) for title, chart in charts.items()
    ]
    folder = group.shown.folder
    return {
        "name": row.name,
        "charts": [each for each in drawn if each is not None],
        "folder": Path(os.path.relpath(folder, home)).as_posix(),
    }


def _sweep(axis: Axis, curves: Sequence[Curve]) -> dict[str, Any]:
    lines = []
    for number, curve in enumerate(curves):
        color = f"--{curve.framework}"
        measured = list(zip(map(float, curve.x), curve.tokens_per_second, strict=True))
        ideal = list(zip(map(float, curve.x), curve.ideal, strict=True))
        lines.append(Series(curve.name, color, measured, DASHES[number % 2], markers=True))
        lines.append(Series("", color, ideal, "1 4"))
    return {
        "name": axis.replace("_", "-"),
        "chart": line_chart(lines, axis.replace("_", "-"), "tokens/s", log_x=True, from_zero=True),
        "sentences": [curve.sentence for curve in curves],
    }


def _memory(pairs: Sequence[tuple[Row, RowRuns]]) -> list[dict[str, Any]]:
    """One line per row and device; what was not counted is empty."""
    lines = []
    for row, group in pairs:
        if group.shown is None:
            continue
        result = group.shown.result
        charts = list(timelines(result).values())
        planned = charts[-1].peak_chunks_in_flight_per_stage if charts else []
        for device in range(result.config.stages):
            held = result.held_activation_peak_bytes.get(device)
            counted = result.in_flight_peak.get(device)
            expected = planned[device] if planned else None
            peak = result.peak_memory_bytes.get(device)
            lines.append(
                {
                    "name": row.name,
                    "device": device,
                    "counted": "" if counted is None else counted,
                    "expected": "" if expected is None else expected,
                    "differs": counted is not None and expected is not None and counted != expected,
                    "held": "" if held is None else f"{held / 1e6:,.1f}",
                    "peak": "" if peak is None else f"{peak / 1e6:,.0f}",
                }
            )
    return lines


def _environments(collection: Collection) -> list[tuple[str, str]]:
    """Every distinct environment as the child read it back, with the rows' framework."""
    found: dict[str, str] = {}
    for row, group in zip(collection.rows, collection.groups, strict=True):
        if group.trained and group.trained.environment:
            text = json.dumps(group.trained.environment, indent=1, default=str)
            found.setdefault(
                text, f"{row.framework}{'' if row.executor == 'table' else ' ' + row.executor}"
            )
    return [(name, text) for text, name in found.items()]
