"""The result files of one or several benchmarks, as the rows of one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from common.io.edges import printable
from common.report.compare import judge_together, oracle_config
from common.report.result import ResultError, RunResult
from common.report.tables import Row, make_rows
from common.report.timing import Timing


@dataclass(frozen=True)
class Run:
    """A result and the folder that holds it."""

    result: RunResult
    folder: Path


@dataclass(frozen=True)
class RowRuns:
    """All repeats of one configuration in one benchmark, and the oracle's run beside them."""

    runs: tuple[Run, ...]
    oracle: RunResult | None
    source: str

    @property
    def results(self) -> list[RunResult]:
        return [run.result for run in self.runs]

    @cached_property
    def shown(self) -> Run | None:
        """The repeat that pictures show: the middle by its median step; None if none is timed."""
        timed = [
            run for run in self.runs if run.result.status == "ok" and run.result.tokens_per_second
        ]
        # Of an even number the slower of the two in the middle: a picture cannot be of both.
        by_speed = sorted(timed, key=lambda run: run.result.tokens_per_second or 0.0)
        return by_speed[(len(by_speed) - 1) // 2] if by_speed else None

    @property
    def timing(self) -> Timing | None:
        """The timing of the repeat that is shown."""
        return self.shown.result.timing if self.shown else None

    @property
    def trained(self) -> RunResult | None:
        """The first repeat that ended well; its losses stand for those of all."""
        return next((result for result in self.results if result.status == "ok"), None)


@dataclass(frozen=True)
class Collection:
    """Everything that a report is made from."""

    groups: tuple[RowRuns, ...]
    oracles: tuple[Run, ...]
    sources: tuple[Path, ...]

    @cached_property
    def rows(self) -> list[Row]:
        """One per group, in order."""
        rows = make_rows([group.results for group in self.groups])
        several = len(self.sources) > 1
        return [
            replace(row, source=group.source) if several else row
            for row, group in zip(rows, self.groups, strict=True)
        ]

    @property
    def pairs(self) -> list[tuple[Row, RowRuns]]:
        return list(zip(self.rows, self.groups, strict=True))

    @property
    def results(self) -> list[RunResult]:
        return [result for group in self.groups for result in group.results]

    @property
    def problems(self) -> list[str]:
        """One line for every run that is not as it should be, in the order of the table."""
        lines = []
        for run in self.oracles:
            if run.result.status != "ok":
                lines.append(f"oracle: {_ended(run)}; --no-parity goes without it")
        for row, group in self.pairs:
            for run in group.runs:
                name = f"{row.name} repeat {run.result.repeat}" if len(group.runs) > 1 else row.name
                if run.result.status != "ok":
                    lines.append(f"{name}: {_ended(run)}")
                elif run.result.parity.status == "FAIL":
                    lines.append(f"{name}: parity: FAIL {run.result.parity.reason}")
        return lines


def _ended(run: Run) -> str:
    log = f" (log: {run.folder.parent / run.result.log})" if run.result.log else ""
    return f"{run.result.status}: {printable(run.result.reason, 500)}{log}"


def collect(folders: Sequence[Path]) -> Collection:
    """Read `<folder>/*/result.json` of every benchmark. Rows of different benchmarks stay apart.

    Raises ResultError for a folder without results and for a file that cannot be read.
    """
    groups: list[RowRuns] = []
    oracles: list[Run] = []
    same_names = len({folder.name for folder in folders}) < len(folders)
    for folder in folders:
        name = printable(str(folder) if same_names else folder.name, 1000)
        runs = [
            Run(RunResult.read(path), path.parent) for path in sorted(folder.glob("*/result.json"))
        ]
        if not runs:
            raise ResultError(
                f"{folder}: holds no */result.json; expected a folder that a benchmark has made"
            )
        # A folder may hold several oracles: other models, or the one with rounded weights.
        # Rows are found again by their whole configuration: repeats have the same one.
        found = [run for run in runs if run.result.is_oracle]
        oracles += found
        references = {run.result.config: run.result for run in found if run.result.status == "ok"}
        rows: dict[object, list[Run]] = {}
        for run in sorted(runs, key=lambda run: (run.result.row, run.result.repeat)):
            if not run.result.is_oracle:
                rows.setdefault(run.result.config, []).append(run)
        groups += [
            RowRuns(tuple(each), references.get(oracle_config(each[0].result.config)), name)
            for each in rows.values()
        ]
    return Collection(_with_verdicts(groups), tuple(oracles), tuple(folders))


def _with_verdicts(groups: Sequence[RowRuns]) -> tuple[RowRuns, ...]:
    """Apply `judge_together`: only now are the runs of all frameworks and benchmarks together."""
    verdicts = iter(judge_together([result for group in groups for result in group.results]))

    def judged(run: Run) -> Run:
        return replace(run, result=run.result.model_copy(update={"parity": next(verdicts)}))

    return tuple(replace(group, runs=tuple(judged(run) for run in group.runs)) for group in groups)
