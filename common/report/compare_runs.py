"""Compare two benchmarks row by row: what moved beyond noise, and what no longer ends well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from common.io.console import say
from common.report.collect import Collection, RowRuns
from common.report.grid import Grid
from common.report.statistics import (
    LEAST_REPEATS,
    LEAST_STEPS,
    TOO_FEW,
    Ratio,
    is_enough,
    speed_ratio,
)
from common.report.tables import Row, number, seconds_per_token
from common.spec.run import RunConfig

NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class Change:
    """One row of both benchmarks; `ratio`: B's throughput over A's, None if one was not ranked."""

    name: str
    before: Row
    after: Row
    ratio: Ratio | None

    @property
    def verdict(self) -> str:
        if self.broke:
            return "no longer ok: " + (
                self.after.status if self.after.status != "ok" else f"parity {self.after.parity}"
            )
        if self.ratio is None:
            return NOT_COMPARED
        return self.ratio.verdict

    @property
    def broke(self) -> bool:
        """Whether it was ranked in A and is not in B."""
        return self.before.ranked and not self.after.ranked

    @property
    def is_judged(self) -> bool:
        """Whether a gate can judge it."""
        return self.broke or (self.ratio is not None and self.ratio.high is not None)

    def slower_than(self, limit: float) -> bool:
        """Return whether B lost more than `limit` (0.05 for 5 %) of A's throughput.

        The whole interval must be beyond it.
        """
        # With [0.90, 0.97] and a limit of 5 % the loss may be 3 %: not shown to be slower.
        return bool(self.ratio and self.ratio.high is not None and self.ratio.high < 1 - limit)


@dataclass(frozen=True)
class ComparedRuns:
    """All rows of two benchmarks."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    notes: tuple[str, ...]

    def failures(self, limit: float) -> list[str]:
        """Return why a gate with this limit would reject B, one line each."""
        return [
            f"{change.name}: "
            f"{change.verdict if change.broke else f'slower by more than {limit:.3%}'}"
            for change in self.changes
            if change.broke or change.slower_than(limit)
        ]


def compare_collections(before: Collection, after: Collection) -> ComparedRuns:
    """Match rows by their whole configuration; their speeds count on one kind of device only."""
    old, new = before.pairs, after.pairs
    changes = []
    matched = _matched(old, new)
    for (row, group), (after_row, after_group) in matched:
        both = row.ranked and after_row.ranked and row.device == after_row.device
        a, b = seconds_per_token(group.results), seconds_per_token(after_group.results)
        ratio = speed_ratio(b, a, same_session=False) if both else None
        name = row.name if row.name == after_row.name else f"{row.name} -> {after_row.name}"
        changes.append(Change(name, row, after_row, ratio))
    lefts, rights = ([pair[side] for pair in matched] for side in (0, 1))
    return ComparedRuns(
        changes=tuple(changes),
        only_before=tuple(row.name for row, group in old if (row, group) not in lefts),
        only_after=tuple(row.name for row, group in new if (row, group) not in rights),
        notes=tuple(_notes(before, after, changes)),
    )


_Pair = tuple[Row, RowRuns]


def _matched(old: Sequence[_Pair], new: Sequence[_Pair]) -> list[tuple[_Pair, _Pair]]:
    """Rows of the same configuration, in the order of A.

    Where an interpreter lies does not matter, only its name; and not that, where each side has one
    row left: two versions of a framework may be what is compared.
    """

    # The whole configuration is the key: a row with another dtype or threads is another row.
    def key(pair: _Pair, named: bool) -> tuple[RunConfig, str]:
        row, group = pair
        config = group.results[0].config.model_copy(update={"python": None})
        return config, row.python if named else ""

    found: dict[int, _Pair] = {}
    for named in (True, False):
        left = [pair for index, pair in enumerate(old) if index not in found]
        right = [pair for pair in new if pair not in found.values()]
        for index, pair in enumerate(old):
            alike = [other for other in right if key(other, named) == key(pair, named)]
            rivals = [other for other in left if key(other, named) == key(pair, named)]
            if index not in found and len(alike) == len(rivals) == 1:
                found[index] = alike[0]
    return [(old[index], found[index]) for index in sorted(found)]


def _notes(before: Collection, after: Collection, changes: Sequence[Change]) -> list[str]:
    """List what weakens the comparison."""
    notes = []
    devices = dict.fromkeys(
        f"{change.before.device} against {change.after.device}"
        for change in changes
        if change.before.ranked and change.after.ranked
        if change.before.device != change.after.device
    )
    if devices:
        notes.append(f"different devices, whose speeds are not compared: {', '.join(devices)}")
    machines = [{result.machine.one_line for result in each.results} for each in (before, after)]
    if machines[0] != machines[1]:
        notes.append(
            f"different machines: {'; '.join(sorted(machines[0]))} against "
            f"{'; '.join(sorted(machines[1]))}"
        )
    if any(
        not is_enough(seconds_per_token(group.results))
        for each in (before, after)
        for group in each.groups
    ):
        notes.append(
            f"{TOO_FEW}: an interval takes {LEAST_STEPS} timed steps in each of {LEAST_REPEATS} "
            "repeats, in A and in B"
        )
    return notes


def print_comparison(compared: ComparedRuns, console: Console) -> None:
    cells = [
        [
            change.name,
            number(change.before.tokens_per_second, ",.0f"),
            number(change.after.tokens_per_second, ",.0f"),
            change.ratio.text(".3f") if change.ratio else "",
            change.verdict,
        ]
        for change in compared.changes
    ]
    styles = ["red" if c.broke or c.verdict == "slower" else "" for c in compared.changes]
    titles = ("row", "tokens/s A", "tokens/s B", "B / A [95 %]", "verdict")
    console.print(Grid(titles, cells, ("row", "verdict"), styles).rich())
    _print_names("only in A", compared.only_before, console)
    _print_names("only in B", compared.only_after, console)
    for note in compared.notes:
        say(console, f"note: {note}")


def _print_names(what: str, names: Sequence[str], console: Console) -> None:
    if names:
        say(console, f"{what}: {', '.join(names)}")
