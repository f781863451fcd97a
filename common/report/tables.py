"""The cross-framework table: in the terminal, as Markdown, and as CSV with units in its titles."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

from rich.console import Console
from rich.measure import Measurement

from common.report.grid import Grid
from common.report.names import dropout_words, interpreter_name, shards_word, variant
from common.report.result import RunResult
from common.report.statistics import (
    LEAST_FOR_PERCENTILES,
    LEAST_REPEATS,
    LEAST_STEPS,
    Ratio,
    Samples,
    speed_ratio,
    summarize,
)
from common.spec.efficiency import model_flops_per_token


@dataclass(frozen=True)
class Row:
    """One row: all repeats of one configuration. None where nothing was measured."""

    framework: str
    version: str
    schedule: str
    stages: int
    chunks: int
    micro_batches: int
    batch_size: int
    """Sequences in one mini-batch."""
    executor: str
    track: str
    dtype: str
    status: str
    parity: str
    repeats: int
    final_loss: float | None
    held_out_loss: float | None
    tokens_per_second: float | None
    """Median over the repeats of each run's own median."""
    ratio: float | None
    """To the first ranked row of its track and device; None for a row that is not ranked."""
    ratio_low: float | None
    ratio_high: float | None
    """95 % bootstrap interval; None for the first ranked row, and of too few samples."""
    step_ms_median: float | None
    """Over the timed steps of all repeats."""
    step_ms_p10: float | None
    step_ms_p90: float | None
    first_step_seconds: float | None
    bubble_fraction: float | None
    """Measured; median over the repeats. None where stages share a GPU, as what follows."""
    simulated_bubble_fraction: float | None
    simulated_step_difference: float | None
    """Simulated over measured step time, less 1; median over the repeats."""
    peak_memory_mb: float | None
    """10^6 bytes, added over the processes (or CUDA devices) of a run; the largest repeat."""
    held_activation_mb: float | None
    """10^6 bytes of activations held for the backward on the stage that holds most."""
    is_baseline: bool = False
    """The first ranked row of its track and device, which the others' ratios are to."""
    timed_steps: int = 0
    """Of the repeat that has fewest."""
    source: str = ""
    """The benchmark's folder, where several are shown together."""
    recompute: str = "none"
    dropout: str = "none"
    """Whose masks, and the probability."""
    sequence_lengths: str = "full"
    drift: str = ""
    device: str = "cpu"
    """cpu, or the card's name; empty where no repeat got so far."""
    python: str = ""
    """The interpreter that the user has named, in short; empty for the default."""
    gpus: int = 0
    """Cards that the stages lie on; 0 on the CPU, and where nobody has said."""
    model_flops_per_token: float = 0.0
    """Forward and backward, without recomputation (`common.spec.efficiency`)."""
    model_tflops_per_device: float | None = None
    """10^12 model FLOPs a second per card, on the CPU per stage; median over the repeats."""
    peak_tflops: float | None = None
    """Measured matrix products of all devices together; median over the repeats."""
    mfu: float | None = None
    """Model FLOPs utilization: a fraction of the measured peak; median over the repeats."""
    published_peak_tflops: float | None = None
    """Of the cards' data sheets."""
    published_mfu: float | None = None
    peak_measured_by: str = ""
    replicas: int = 1
    shards: str = ""
    """`common.report.names.shards_word`"""
    compress: str = "none"

    @property
    def shares_gpu(self) -> bool:
        """Whether stages take turns on a card: its idle time is then no bubble of any of them."""
        return 0 < self.gpus < self.stages

    @property
    def throughput_range(self) -> tuple[float, float]:
        """Tokens/s if every step took its 90th percentile, and its 10th; unknown: its median."""
        # 1,000 tokens/s at a median of 50 ms are 500 at a 90th percentile of 100 ms.
        speed, median = self.tokens_per_second or 0.0, self.step_ms_median or 1.0
        return speed * median / (self.step_ms_p90 or median), speed * median / (
            self.step_ms_p10 or median
        )

    @property
    def ranked(self) -> bool:
        """Whether the throughput counts: all repeats ended well, none trained something else."""
        return self.status == "ok" and self.parity not in ("FAIL", "not comparable")

    @property
    def framework_name(self) -> str:
        """The framework, and which of several interpreters had it."""
        return "@".join(filter(None, [self.framework, self.python]))

    @property
    def name(self) -> str:
        """The row in words, as in the progress bar."""
        words = [
            self.framework_name,
            self.schedule,
            self.executor if self.executor != "table" else "",
        ]
        words += [
            f"p={self.stages}",
            f"v={self.chunks}" if self.chunks > 1 else "",
            f"d={self.replicas}" if self.replicas > 1 else "",
            self.shards,
            f"m={self.micro_batches}",
        ]
        words += [self.source]
        words += variant(
            self.dtype,
            self.track,
            self.recompute,
            self.dropout,
            self.sequence_lengths,
            self.drift,
            self.compress,
        )
        return " ".join(filter(None, words))

    @property
    def verdict(self) -> str:
        """What the ratio shows, in words."""
        if not self.ranked:
            return "not ranked"
        if self.ratio is None:
            return ""
        if self.is_baseline:
            return "baseline"
        return Ratio(self.ratio, self.ratio_low, self.ratio_high).verdict


KIND = (
    *("framework", "python", "device", "dtype", "track", "source"),
    *("recompute", "dropout", "sequence_lengths", "drift", "compress"),
)
"""Fields that rows share which train the same in one framework, on one kind of device."""


AS_ASKED = (
    *("framework", "stages", "chunks", "replicas", "executor", "track"),
    *("recompute", "sequence_lengths", "compress"),
)
"""Fields of a row that are the run's own."""


def make_rows(groups: Sequence[Sequence[RunResult]]) -> list[Row]:
    """One row per group, one configuration's repeats. Ratios are within a track and device."""
    groups = [group for group in groups if group]
    rows = [_row(group) for group in groups]
    # By track, device and CPU: when the first ranked row began, and its samples. Rows on other
    # devices have a baseline of their own; a ratio between a CPU and a GPU would say nothing.
    baselines: dict[tuple[str, str, str], tuple[str, Samples]] = {}
    rated = []
    for row, group in zip(rows, groups, strict=True):
        cpu = group[0].machine.cpu if row.device == "cpu" else ""
        samples, kind = seconds_per_token(group), (row.track, row.device, cpu)
        if not (row.ranked and samples):
            rated.append(row)
        elif kind not in baselines:
            baselines[kind] = group[0].started, samples
            rated.append(replace(row, ratio=1.0, is_baseline=True))
        else:
            started, baseline = baselines[kind]
            # Repeats of one session took turns and are paired; those of a merged report did not.
            ratio = speed_ratio(samples, baseline, same_session=group[0].started == started)
            rated.append(
                row
                if ratio is None
                else replace(row, ratio=ratio.value, ratio_low=ratio.low, ratio_high=ratio.high)
            )
    return rated


def seconds_per_token(repeats: Sequence[RunResult]) -> Samples:
    """Return the timed steps by repeat; repeats without any are left out."""
    return {
        result.repeat: [second / result.tokens_per_step for second in result.steady_seconds]
        for result in repeats
        if result.status == "ok" and result.steady_seconds
    }


def _row(repeats: Sequence[RunResult]) -> Row:
    config = repeats[0].config
    good = [result for result in repeats if result.status == "ok"]
    step = summarize([second * 1e3 for result in good for second in result.steady_seconds])
    # Where stages take turns on a GPU, an idle stage is not a bubble but another one's turn.
    alone = [result.timing for result in good if result.timing and not result.shares_gpu]
    device, gpus = (good[0].device, good[0].gpus) if good else ("", 0)
    peaks = [result.peak for result in good if result.peak]
    flops = _median([result.model_flops_per_second for result in good])
    devices = config.stages * config.replicas * config.tensor_parallel
    return Row(
        **{name: getattr(config, name) for name in AS_ASKED},
        version=next((result.version for result in good), ""),
        schedule=config.schedule_name,
        micro_batches=config.train.micro_batches,
        batch_size=config.train.batch_size,
        dtype=config.train.dtype,
        status=_status(repeats),
        parity=_parity(good),
        repeats=len(repeats),
        final_loss=good[0].final_loss if good else None,
        held_out_loss=good[0].held_out_loss if good else None,
        tokens_per_second=_median([result.tokens_per_second for result in good]),
        ratio=None,
        ratio_low=None,
        ratio_high=None,
        timed_steps=min((len(result.steady_seconds) for result in good), default=0),
        step_ms_median=step.median if step else None,
        step_ms_p10=step.p10 if step else None,
        step_ms_p90=step.p90 if step else None,
        first_step_seconds=_median([result.first_step_seconds for result in good]),
        bubble_fraction=_median([timing.measured_bubble_fraction for timing in alone]),
        simulated_bubble_fraction=_median([timing.simulated_bubble_fraction for timing in alone]),
        simulated_step_difference=_median([timing.step_difference for timing in alone]),
        peak_memory_mb=max(
            (sum(result.peak_memory_bytes.values()) / 1e6 for result in good), default=None
        ),
        held_activation_mb=max(
            (held / 1e6 for result in good for held in result.held_activation_peak_bytes.values()),
            default=None,
        ),
        dropout=dropout_words(config),
        drift=config.drift or "",
        device=device,
        python=interpreter_name(config.python),
        gpus=gpus,
        model_flops_per_token=model_flops_per_token(config),
        model_tflops_per_device=_tera(flops, gpus or devices),
        peak_tflops=_tera(_median([peak.measured_flops_per_second for peak in peaks])),
        mfu=_median([result.mfu for result in good]),
        published_peak_tflops=_tera(_median([peak.published_flops_per_second for peak in peaks])),
        published_mfu=_median([result.published_mfu for result in good]),
        shards=shards_word(config),
        peak_measured_by=next((peak.measured_by for peak in peaks), ""),
    )


def _status(repeats: Sequence[RunResult]) -> str:
    failed = sum(result.status == "failed" for result in repeats)
    if failed:
        return "failed" if len(repeats) == 1 else f"failed {failed} of {len(repeats)}"
    return repeats[0].status


def _parity(good: Sequence[RunResult]) -> str:
    # The worst of the repeats: one that trains something else is enough.
    verdicts = [result.parity.status for result in good]
    order = ("FAIL", "not comparable", "not checked", "pass")
    return next((verdict for verdict in order if verdict in verdicts), "")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _tera(value: float | None, devices: int = 1) -> float | None:
    return None if value is None else value / 1e12 / devices


# ------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Column:
    """A column. `keep` is its rank in a narrow terminal (0: always shown)."""

    title: str
    cell: Callable[[Row], str]
    numeric: bool = True
    keep: int = 0


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _step(row: Row) -> str:
    if row.step_ms_median is None:
        return ""
    form = ".0f" if row.step_ms_median >= 100 else ".1f"
    if row.step_ms_p10 is None or row.step_ms_p90 is None:
        return f"{row.step_ms_median:{form}}"
    return f"{row.step_ms_median:{form}} [{row.step_ms_p10:{form}}, {row.step_ms_p90:{form}}]"


def _ratio(row: Row) -> str:
    if row.parity in ("FAIL", "not comparable"):
        return "not ranked"
    if row.ratio is None or row.is_baseline:
        return number(row.ratio, ".2f")
    return Ratio(row.ratio, row.ratio_low, row.ratio_high).text()


def _device_cell(row: Row) -> str:
    return f"{row.gpus} x {row.device}" if row.gpus else row.device


def _bubble(row: Row) -> str:
    if row.shares_gpu:
        return "shared GPU"
    if row.bubble_fraction is None or row.simulated_bubble_fraction is None:
        return ""
    return f"{row.bubble_fraction:.1%} / {row.simulated_bubble_fraction:.1%}"


COLUMNS: tuple[Column, ...] = (
    Column("run", lambda row: row.source, numeric=False),
    Column("framework", lambda row: row.framework_name, numeric=False),
    Column("version", lambda row: row.version, numeric=False, keep=3),
    Column("schedule", lambda row: row.schedule, numeric=False),
    Column("stages", lambda row: str(row.stages)),
    Column("chunks", lambda row: str(row.chunks)),
    Column("replicas", lambda row: str(row.replicas)),
    Column("shards", lambda row: row.shards or "t=1", numeric=False),
    Column("compress", lambda row: row.compress, numeric=False),
    Column("micro-batches", lambda row: str(row.micro_batches), keep=4),
    Column("executor", lambda row: row.executor, numeric=False, keep=12),
    Column("device", _device_cell, numeric=False, keep=11),
    Column("dtype", lambda row: row.dtype, numeric=False),
    Column("recompute", lambda row: row.recompute, numeric=False),
    Column("dropout", lambda row: row.dropout, numeric=False),
    Column("lengths", lambda row: row.sequence_lengths, numeric=False),
    Column("drift", lambda row: row.drift or "none", numeric=False),
    Column("status", lambda row: row.status, numeric=False),
    Column("parity", lambda row: row.parity, numeric=False),
    Column("final loss", lambda row: number(row.final_loss, ".5f"), keep=8),
    Column("held-out loss", lambda row: number(row.held_out_loss, ".5f"), keep=2),
    Column("tokens/s", lambda row: number(row.tokens_per_second, ",.0f")),
    Column("ratio [95 %]", _ratio, keep=10),
    Column("verdict", lambda row: row.verdict, numeric=False, keep=9),
    Column("step ms [p10, p90]", _step, keep=7),
    Column("MFU", lambda row: number(row.mfu, ".0%"), keep=6),
    Column("first step s", lambda row: number(row.first_step_seconds, ".2f"), keep=6),
    Column("bubble / sim.", _bubble, keep=5),
    Column("sim. step", lambda row: number(row.simulated_step_difference, "+.1%"), keep=4),
    Column("peak MB", lambda row: number(row.peak_memory_mb, ",.0f"), keep=4),
    Column("held MB", lambda row: number(row.held_activation_mb, ",.1f"), keep=3),
)

LEGEND = (
    "tokens/s, step ms: medians of the timed steps (brackets: 10th and 90th percentile, of "
    f"{LEAST_FOR_PERCENTILES} steps or more). First step: apart, it traces and fills caches. "
    "Ratio: tokens/s to the first ranked row on the same kind of device, with a 95 % bootstrap "
    "interval (repeats, then steps); paired by repeat, so that a drifting machine cancels; where "
    f"the interval includes 1, no difference is shown. It takes {LEAST_STEPS} timed steps in each "
    f"of {LEAST_REPEATS} repeats; of fewer it is unknown, and there is no verdict. A row that "
    "fails parity, or has nothing to be compared with, is not ranked. Parity: against the float64 "
    "NumPy oracle, loss of every step and all gradients. Bubble: idle share of all stages, "
    "measured / simulated from the run's own costs; sim. step: simulated step time against the "
    "measured median; where stages share a GPU there is no bubble to speak of. MFU: FLOPs that the "
    "model needs, as a share of what the devices can multiply (measured). Peak MB: 10^6 bytes, all "
    "processes of a replica; held MB: activations held for the backward, on the fullest stage."
)


def columns_for(rows: Sequence[Row]) -> list[Column]:
    """Return all columns except empty ones, and those equal in every row that nobody asked for."""
    # By title, whether a column says the same in every row, which is what nobody asked about.
    constant = {
        "run": all(not row.source for row in rows),
        "chunks": all(row.chunks == 1 for row in rows),
        "replicas": all(row.replicas == 1 for row in rows),
        "shards": not any(row.shards for row in rows),
        "compress": all(row.compress == "none" for row in rows),
        "device": all(row.device in ("", "cpu") for row in rows),
        "dtype": len({row.dtype for row in rows}) == 1,
        "executor": all(row.executor == "table" for row in rows),
        "recompute": all(row.recompute == "none" for row in rows),
        "dropout": not any(row.dropout.startswith("native") for row in rows)
        and len({row.dropout for row in rows}) == 1,
        "lengths": all(row.sequence_lengths == "full" for row in rows),
        "drift": not any(row.drift for row in rows),
        "bubble / sim.": all(row.bubble_fraction is None and not row.shares_gpu for row in rows),
        "sim. step": all(row.simulated_step_difference is None for row in rows),
        "MFU": all(row.mfu is None for row in rows),
        "held MB": all(row.held_activation_mb is None for row in rows),
    }
    return [column for column in COLUMNS if not constant.get(column.title, False)]


def by_track(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of every track; they are never shown in one table."""
    return {
        track: [row for row in rows if row.track == track]
        for track in dict.fromkeys(row.track for row in rows)
    }


def grid(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> Grid:
    """Return the table of these columns (default: `columns_for` the rows)."""
    columns = columns_for(rows) if columns is None else columns
    return Grid(
        [column.title for column in columns],
        [[column.cell(row) for column in columns] for row in rows],
        {column.title for column in columns if not column.numeric},
        [_style(row) for row in rows],
    )


def _style(row: Row) -> str:
    unjudged = row.status == "skipped" or (row.status == "ok" and row.parity == "not comparable")
    return "" if row.ranked else ("dim" if unjudged else "red")


def print_table(rows: Sequence[Row], console: Console) -> bool:
    """Print the table, and note it if columns were left out because the terminal is too narrow."""
    columns, dropped = columns_for(rows), False
    unfolded = console.options.update(max_width=10_000)
    while True:
        table = grid(rows, columns).rich(fold_titles=True)
        # As wide as the table would like to be, were the terminal endless.
        needed = Measurement.get(console, unfolded, table).maximum
        # Of all columns that may go, the one that matters least.
        least = min(
            (each for each in columns if each.keep), key=lambda each: each.keep, default=None
        )
        if needed <= console.width or least is None:
            console.print(table)
            return dropped
        columns.remove(least)
        dropped = True


def csv_table(rows: Sequence[Row]) -> str:
    """Return every value in full, one line per row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
