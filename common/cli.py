"""The console script `triptych`, with one verb per task. `bench_all.py` is its verb `bench`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from common.bench import print_dry_run, run_bench
from common.config import add_options, read_bench
from common.runtime.launch import IMPLEMENTATIONS, Implementation
from common.settings import Parser, UsageError
from common.verbs import convert, drift, inference, margins, numerics, relay, report, schedules, train

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130

BENCH_DESCRIPTION = (
    "Trains one Transformer with several frameworks, pipeline schedules and numbers of stages, each run in a process of "
    "its own, compares every run with a float64 oracle, and prints a table of losses, throughput and memory. "
    "Exit status: 0 all well; 1 a run failed or differs from the oracle; 2 wrong input; 130 interrupted."
)

PLAIN_WIDTH = 200
"""Columns where the output is no terminal, so that tables are not folded."""


def main(argv: Sequence[str] | None = None) -> int:
    """`triptych VERB ...`. Returns the exit status."""
    parser = Parser(
        prog="triptych",
        description="One Transformer, one partition plan and one pipeline schedule in three frameworks.",
        usage="%(prog)s VERB [options]",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser, prog="triptych")
    bench = verbs.add_parser("bench", help="train and compare the frameworks", description=BENCH_DESCRIPTION)
    add_options(bench)
    bench.set_defaults(run=_bench)
    train.register(verbs)
    relay.register(verbs)
    inference.register(verbs)
    convert.register(verbs)
    report.register(verbs)
    schedules.register(verbs)
    numerics.register(verbs)
    drift.register(verbs)
    margins.register(verbs)
    return _run(parser, sys.argv[1:] if argv is None else argv)


def bench_main(
    argv: Sequence[str] | None = None, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> int:
    """`bench_all.py ...`. Returns the exit status."""
    parser = Parser(prog="bench_all.py", description=BENCH_DESCRIPTION)
    add_options(parser)
    parser.set_defaults(run=lambda arguments: _bench(arguments, implementations))
    return _run(parser, sys.argv[1:] if argv is None else argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Parses and runs; wrong input is one line on stderr, never a traceback."""
    try:
        arguments = parser.parse_args(argv)
        arguments.command = shlex.join([parser.prog, *argv])
        return int(arguments.run(arguments) or 0)
    except UsageError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _bench(arguments: argparse.Namespace, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS) -> int:
    bench = read_bench(arguments)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=PLAIN_WIDTH)
    if bench.dry_run:
        print_dry_run(bench, console)
        return 0
    return run_bench(bench, arguments.command, console, implementations)


if __name__ == "__main__":
    sys.exit(main())
