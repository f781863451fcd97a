"""The cross-framework table: in the terminal, as Markdown, and as CSV with units in the column names."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from common.report.result import RunResult


@dataclass(frozen=True)
class Row:
    """One row: all repeats of one configuration. None where nothing was measured."""

    framework: str
    version: str
    schedule: str
    stages: int
    chunks: int
    micro_batches: int
    executor: str
    dtype: str
    status: str
    parity: str
    final_loss: float | None
    held_out_loss: float | None
    tokens_per_second: float | None
    """Median over the repeats of each run's own median."""
    ratio: float | None
    """To the first row that is ranked; None for a row that is not."""
    step_ms_median: float | None
    """Over the steps after the first, of all repeats."""
    step_ms_p10: float | None
    step_ms_p90: float | None
    first_step_seconds: float | None
    peak_memory_mb: float | None
    """10^6 bytes, added over the processes (or CUDA devices) of a run; the largest of the repeats."""

    @property
    def ranked(self) -> bool:
        """Whether the throughput counts: every repeat ended well and none trained something else."""
        return self.status == "ok" and self.parity != "FAIL"


def make_rows(groups: Sequence[Sequence[RunResult]]) -> list[Row]:
    """One row per group; a group holds the repeats of one configuration."""
    rows = [_row(group) for group in groups if group]
    ranked = [row.tokens_per_second for row in rows if row.ranked and row.tokens_per_second]
    return [
        Row(**asdict(row) | {"ratio": row.tokens_per_second / ranked[0]})
        if row.ranked and row.tokens_per_second
        else row
        for row in rows
    ]


def _row(repeats: Sequence[RunResult]) -> Row:
    config = repeats[0].config
    good = [result for result in repeats if result.status == "ok"]
    seconds = [second for result in good for second in result.steady_seconds]
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]) * 1e3 if seconds else (None, None, None)
    return Row(
        framework=config.framework,
        version=next((result.version for result in good), ""),
        schedule=config.schedule,
        stages=config.stages,
        chunks=config.chunks,
        micro_batches=config.train.micro_batches,
        executor=config.executor,
        dtype=config.train.dtype,
        status=_status(repeats),
        parity=_parity(good),
        final_loss=good[0].final_loss if good else None,
        held_out_loss=good[0].held_out_loss if good else None,
        tokens_per_second=_median([result.tokens_per_second for result in good]),
        ratio=None,
        step_ms_median=median,
        step_ms_p10=p10,
        step_ms_p90=p90,
        first_step_seconds=_median([result.first_step_seconds for result in good]),
        peak_memory_mb=max((sum(result.peak_memory_bytes.values()) / 1e6 for result in good), default=None),
    )


def _status(repeats: Sequence[RunResult]) -> str:
    failed = sum(result.status == "failed" for result in repeats)
    if failed:
        return "failed" if len(repeats) == 1 else f"failed {failed} of {len(repeats)}"
    return repeats[0].status


def _parity(good: Sequence[RunResult]) -> str:
    verdicts = [result.parity.status for result in good]
    return next((verdict for verdict in ("FAIL", "not checked", "pass") if verdict in verdicts), "")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Column:
    """How a column is headed and filled; `keep` says how long it stays when the terminal is narrow (0: always)."""

    title: str
    cell: Callable[[Row], str]
    numeric: bool = True
    keep: int = 0


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _step(row: Row) -> str:
    if row.step_ms_median is None:
        return ""
    form = ".0f" if row.step_ms_median >= 100 else ".1f"
    return f"{row.step_ms_median:{form}} [{row.step_ms_p10:{form}}, {row.step_ms_p90:{form}}]"


def _ratio(row: Row) -> str:
    return "not ranked" if row.parity == "FAIL" else _number(row.ratio, ".2f")


COLUMNS: tuple[Column, ...] = (
    Column("framework", lambda row: row.framework, numeric=False),
    Column("version", lambda row: row.version, numeric=False, keep=3),
    Column("schedule", lambda row: row.schedule, numeric=False),
    Column("stages", lambda row: str(row.stages)),
    Column("chunks", lambda row: str(row.chunks)),
    Column("micro-batches", lambda row: str(row.micro_batches), keep=4),
    Column("executor", lambda row: row.executor, numeric=False, keep=1),
    Column("dtype", lambda row: row.dtype, numeric=False),
    Column("status", lambda row: row.status, numeric=False),
    Column("parity", lambda row: row.parity, numeric=False),
    Column("final loss", lambda row: _number(row.final_loss, ".5f"), keep=8),
    Column("held-out loss", lambda row: _number(row.held_out_loss, ".5f"), keep=2),
    Column("tokens/s", lambda row: _number(row.tokens_per_second, ",.0f")),
    Column("ratio", _ratio, keep=7),
    Column("step ms [p10, p90]", _step, keep=6),
    Column("first step s", lambda row: _number(row.first_step_seconds, ".2f"), keep=5),
    Column("peak MB", lambda row: _number(row.peak_memory_mb, ",.0f"), keep=4),
)

LEGEND = (
    "tokens/s, step ms: medians of the steps after the first (brackets: 10th and 90th percentile); first step: apart, "
    "it traces and fills caches; ratio: tokens/s to the first ranked row; a row that fails parity is not ranked; peak MB: "
    "10^6 bytes, all processes of a run; parity: against the float64 NumPy oracle, loss of every step and all gradients."
)


def columns_for(rows: Sequence[Row]) -> list[Column]:
    """All columns but those that say the same in every row without having been asked for."""
    constant = {
        "chunks": all(row.chunks == 1 for row in rows),
        "dtype": len({row.dtype for row in rows}) == 1,
    }
    return [column for column in COLUMNS if not constant.get(column.title, False)]


def print_table(rows: Sequence[Row], console: Console) -> bool:
    """Prints the table; says whether columns were left out because the terminal is too narrow."""
    columns = columns_for(rows)
    table = _rich_table(rows, columns)
    dropped = False
    while _width(table, console) > console.width and any(column.keep for column in columns):
        least = min((column for column in columns if column.keep), key=lambda column: column.keep)
        columns.remove(least)
        table, dropped = _rich_table(rows, columns), True
    console.print(table)
    return dropped


def _width(table: Table, console: Console) -> int:
    """Columns that the table needs to be shown unfolded."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _rich_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        title = Text(column.title.replace("micro-", "micro- ").replace(" ", "\n", 1))
        table.add_column(title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        style = None if row.ranked else ("dim" if row.status == "skipped" else "red")
        table.add_row(*(column.cell(row) for column in columns), style=style)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    columns = columns_for(rows)
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "| " + " | ".join("---:" if column.numeric else "---" for column in columns) + " |",
    ]
    lines += ["| " + " | ".join(column.cell(row) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[Row]) -> str:
    """Every value in full, one line per row."""
    return str(pd.DataFrame([asdict(row) for row in rows]).to_csv(index=False))
