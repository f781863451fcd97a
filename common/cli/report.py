"""The subcommands report and compare, over finished benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.io.console import make_console, say
from common.io.edges import number
from common.io.usage import UsageError
from common.report import tables
from common.report.collect import Collection, collect
from common.report.compare_runs import compare_collections, print_comparison
from common.report.facts import fallbacks, parity_verdict
from common.report.result import ResultError
from common.report.statistics import LEAST_REPEATS, LEAST_STEPS, TOO_FEW

EXIT_OK, EXIT_SLOWER = 0, 1


def register(subcommands: Any) -> None:
    """Add the subcommands to argparse's subparsers."""
    what = "a folder that a benchmark has made, such as results/..."
    report = subcommands.add_parser("report", usage="%(prog)s RUN.. [options]")
    report.add_argument("runs", nargs="+", metavar="RUN", help=what)
    report.add_argument(
        "--out", metavar="FOLDER", help="where to write; default: RUN itself, needed for several"
    )
    report.add_argument(
        "--sweep", action="store_true", help="add throughput over micro-batches and over stages"
    )
    report.set_defaults(run=_report)

    compare = subcommands.add_parser("compare", usage="%(prog)s RUN_A RUN_B [--fail-on LIMIT]")
    compare.add_argument("before", metavar="RUN_A", help=what)
    compare.add_argument("after", metavar="RUN_B", help="another one")
    compare.add_argument(
        "--fail-on",
        metavar="LIMIT",
        type=_share,
        help="exit with status 1 if a row has lost more than LIMIT (such as 5%%) of its throughput "
        "with its whole 95 %% interval, or no longer ends well",
    )
    compare.set_defaults(run=_compare)


def _share(text: str) -> float:
    """5% or 0.05."""
    found = number(text.removesuffix("%"))
    value = -1.0 if found is None else found / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        what = "expected a share below 100 %, such as 5% or 0.05"
        raise argparse.ArgumentTypeError(f"{text!r}; {what}")
    return value


def _collected(*folders: str) -> Collection:
    """Raises ResultError for a folder without a single run of a framework."""
    collection = collect([Path(folder) for folder in folders])
    if not collection.groups:
        raise ResultError(
            f"{', '.join(folders)}: holds the oracle's result only; expected a finished benchmark"
        )
    return collection


def _report(arguments: argparse.Namespace) -> int:
    if arguments.out is None and len(arguments.runs) > 1:
        raise UsageError("several runs are written together; add --out FOLDER")
    if len({Path(run).resolve() for run in arguments.runs}) < len(arguments.runs):
        raise UsageError("the same run twice; use different ones")
    folder = Path(arguments.out or arguments.runs[0])
    collection = _collected(*arguments.runs)
    from common.report.publish import publish, sweeps  # imported here, with all that draws

    if arguments.sweep and not sweeps(collection):
        raise UsageError(
            "--sweep: no two ranked rows differ in micro-batches or in stages alone; expected a "
            "benchmark with a list, --micro-batches 1,2,4 or --stages 1,2,4"
        )
    try:
        publish(collection, folder, arguments.sweep)
    except (FileExistsError, NotADirectoryError) as error:
        why = f"{error.strerror}; expected a folder that can be written"
        raise UsageError(f"--out {folder}: {why}") from None
    console = make_console()
    for rows in tables.by_track(collection.rows).values():
        tables.print_table(rows, console)
        console.print()
    say(console, parity_verdict(collection).text)
    for line in fallbacks(collection.results):
        say(console, line)
    say(console, f"report: {folder / 'report.html'}")
    return EXIT_OK


def _compare(arguments: argparse.Namespace) -> int:
    compared = compare_collections(_collected(arguments.before), _collected(arguments.after))
    if not compared.changes:
        raise UsageError(f"{arguments.before} and {arguments.after} have no row in common")
    console = make_console()
    print_comparison(compared, console)
    if arguments.fail_on is not None and not any(change.is_judged for change in compared.changes):
        raise UsageError(
            f"--fail-on: {TOO_FEW} in every row; expected {LEAST_STEPS} timed steps in each of "
            f"{LEAST_REPEATS} repeats"
        )
    failures = [] if arguments.fail_on is None else compared.failures(arguments.fail_on)
    for line in failures:
        say(console, f"fails: {line}")
    return EXIT_SLOWER if failures else EXIT_OK
