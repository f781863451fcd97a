"""The report as Markdown: verdict, tables, measured against simulated, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.report import baselines, tables
from common.report.collect import Collection
from common.report.facts import facts, parity_verdict, timing_note
from common.report.sweep import Axis, Curve


def markdown_report(collection: Collection, swept: Mapping[Axis, Sequence[Curve]]) -> str:
    """Return the whole of report.md."""
    lines = [
        f"# Pipeline-parallel training, preset {collection.results[0].preset}",
        "",
        parity_verdict(collection).text,
        "",
    ]
    lines += [f"- {line}" for line in collection.problems]
    for track, rows in tables.by_track(collection.rows).items():
        lines += ["", f"## Throughput, {track}", "", tables.markdown_table(rows)]
    lines += [tables.LEGEND, ""]
    if ratios := baselines.baseline_ratios(collection):
        lines += [
            "## Against the baselines",
            "",
            "| ours | baseline | ratio [95 %] | |",
            "| --- | --- | ---: | --- |",
        ]
        for each in ratios:
            lines.append(
                f"| {each.ours.name} | {each.baseline.name} | {each.ratio.text()} | "
                f"{each.verdict} |"
            )
        lines += ["", baselines.LEGEND, ""]
    if timing := _timing(collection):
        lines += ["## Measured against simulated", "", *timing, "", timing_note(collection), ""]
    for axis, found in swept.items():
        lines += [
            f"## Sweep over {axis.replace('_', '-')}",
            "",
            f"![throughput](sweep_{axis}.png)",
            "",
        ]
        lines += [f"- {curve.sentence}" for curve in found]
        lines += [""]
    lines += ["## What was run", "", *(f"- {name}: {value}" for name, value in facts(collection))]
    return "\n".join(lines) + "\n"


def _timing(collection: Collection) -> list[str]:
    """Two tables: whole rows, then the stages of each. Empty where nothing was recorded."""
    timed = [
        (row, group.shown.result.timing)
        for row, group in zip(collection.rows, collection.groups, strict=True)
        if group.shown and group.shown.result.timing
    ]
    if not timed:
        return []
    lines = [
        "| row | pipeline ms measured | simulated | replayed | bubble measured | simulated | step "
        "ms measured | simulated |"
        " difference | hop ms |",
        "| --- |" + " ---: |" * 9,
    ]
    for row, timing in timed:
        lines.append(
            f"| {tables.in_cell(row.name)} | {timing.measured_pipeline_seconds * 1e3:,.1f} "
            f"| {timing.simulated_pipeline_seconds * 1e3:,.1f} "
            f"| {timing.replayed_pipeline_seconds * 1e3:,.1f} | "
            f"{timing.measured_bubble_fraction:.1%} "
            f"| {timing.simulated_bubble_fraction:.1%} | {timing.measured_step_seconds * 1e3:,.1f} "
            f"| {timing.simulated_step_seconds * 1e3:,.1f} | {timing.step_difference:+.1%} "
            f"| {timing.hop_seconds * 1e3:.2f} |"
        )
    lines += [
        "",
        "| row | stage | compute ms | communication wait | schedule wait | host | rest | sum |",
        "| --- |" + " ---: |" * 7,
    ]
    for row, timing in timed:
        for device, time in timing.stages.items():
            parts = (
                time.compute,
                time.communication_wait,
                time.schedule_wait,
                time.host,
                time.rest,
                time.total,
            )
            lines.append(
                f"| {tables.in_cell(row.name)} | {device} | "
                + " | ".join(f"{part * 1e3:,.1f}" for part in parts)
                + " |"
            )
    return lines
