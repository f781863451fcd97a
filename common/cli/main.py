"""The console script `triptych`, with one subcommand per task; `bench_all.py` is its `bench`.

A subcommand's module is imported only when it is named, so that none waits for another's imports.
"""

from __future__ import annotations

import importlib
import logging
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.cli.parser import Parser, with_present_names
from common.io.streams import lasting_streams
from common.io.usage import UsageError

if TYPE_CHECKING:
    from common.harness.launch import Implementation

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130

SUBCOMMANDS = {
    "bench": ("bench", "train and compare the frameworks"),
    "train": ("train", "train with one framework, with checkpoints"),
    "evaluate": ("inference", "loss and perplexity of a checkpoint over the held-out text"),
    "generate": ("inference", "continue a text with a checkpoint"),
    "export": ("exchange", "write a checkpoint's weights for use elsewhere"),
    "import": ("exchange", "make a checkpoint of weights from elsewhere"),
    "report": ("report", "make the report of one benchmark, or of several, from its results"),
    "compare": ("report", "say which rows of two benchmarks differ by more than their noise"),
    "plan": ("plan", "choose p, m, v, schedule, partition and recomputation within memory"),
    "draw": ("schedules", "draw a schedule as a chart"),
    "simulate": ("schedules", "time one schedule, or several side by side, without running them"),
    "explain": ("explain", "say what a schedule is: words, formulas in numbers, chart"),
    "validate": ("schedules", "check a schedule in text form"),
    "dump": ("numerics", "write every tensor of one step to a file"),
    "bisect": ("numerics", "name the first tensor in which two runs differ"),
    "drift": ("drift", "put back the frameworks' numerical habits, and see what parity says"),
    "doctor": ("doctor", "measure each framework's kernels: is it slow, or its pipeline?"),
}
"""The module in `common.cli` that registers each subcommand, and what it does in a few words."""

LONG = ("bench", "train", "drift", "relay", "margins")
"""Subcommands whose work outlives a closed output: they say so once and continue."""


def main(
    argv: Sequence[str] | None = None,
    subcommands: Mapping[str, tuple[str, str]] = SUBCOMMANDS,
    package: str = "common.cli",
    prog: str = "triptych",
) -> int:
    """Run `PROG SUBCOMMAND ...` and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog=prog,
        description="One Transformer, one partition plan and one pipeline schedule in three "
        "frameworks.",
        usage="%(prog)s SUBCOMMAND [options]",
    )
    known = parser.add_subparsers(
        title="subcommands", metavar="SUBCOMMAND", required=True, parser_class=Parser, prog=prog
    )
    named = next((word for word in argv if not word.startswith("-")), "")
    if named in subcommands:
        importlib.import_module(f"{package}.{subcommands[named][0]}").register(known)
    else:
        for name, (_, text) in subcommands.items():
            known.add_parser(name, help=text)
    return run(parser, argv, named in LONG)


def bench_main(
    argv: Sequence[str] | None = None, implementations: Mapping[str, Implementation] | None = None
) -> int:
    """Run `bench_all.py ...` and return the exit status."""
    from common.cli import bench

    parser = Parser(prog="bench_all.py", description=bench.DESCRIPTION)
    bench.prepare(parser, implementations)
    return run(parser, sys.argv[1:] if argv is None else argv, is_long=True)


def run(parser: Parser, argv: Sequence[str], is_long: bool = False) -> int:
    """Parse and run; wrong input is one line on stderr, never a traceback. Return the status."""

    def notice(error: OSError) -> str:
        # A reader that has seen enough, such as head, is no error.
        if isinstance(error, BrokenPipeError) and not is_long:
            return ""
        more = "; the work goes on without it" if is_long else ""
        return f"{parser.prog}: standard output: {error.strerror}{more}"

    # Or it complains of a home that cannot be written.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # Where the signal is ignored, nobody learns how a worker process has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with lasting_streams(notice) as output:
        try:
            arguments = parser.parse_args(with_present_names(argv))
            arguments.command = shlex.join([parser.prog, *argv])
            status = int(arguments.run(arguments) or 0)
            output.flush()
            is_lost = output.error is not None and notice(output.error) and not is_long
            return EXIT_USAGE if is_lost else status
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        # OSError: a folder that cannot be written, a disk that is full, no temporary folder
        except (UsageError, OSError) as error:
            return refuse(parser.prog, error)


def refuse(program: str, error: Exception) -> int:
    """Say in one line what is wrong, and return the status for that."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
