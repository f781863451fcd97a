"""How much of every limit of the parity ladder is used."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.cli.drift import steps_shown
from common.cli.numbers import add_timeout, positive
from common.cli.options import file_to_write
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.io.console import make_console
from common.io.edges import write_file
from common.io.usage import chosen
from common.report.machine import this_machine
from common.spec.run import FRAMEWORKS
from tests.campaigns.margins import REFUSED, Margins, measure
from tests.campaigns.margins_page import explanation_in, page, print_margins

DTYPES = ("float64", "float32", "bfloat16")
EXIT_OK, EXIT_SHORT = 0, 1


def register(subcommands: Any) -> None:
    """Add the campaign to argparse's subparsers."""
    parser = subcommands.add_parser(
        "margins",
        description="Every check of the parity ladder over many seeds and models, in every "
        "framework and precision. Exit status: 0 every fixed limit has five times room and "
        "bfloat16 keeps to its rule, 1 otherwise or if a run failed, 2 wrong input.",
    )
    default = {"help": "default: %(default)s"}
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", **default)
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), metavar="F,..", **default)
    parser.add_argument("--dtypes", default=",".join(DTYPES), metavar="T,..", **default)
    written = "write the table as Markdown; what is written by hand stays"
    parser.add_argument("--out", metavar="FILE.md", help=written)
    add_timeout(parser)
    parser.set_defaults(run=run)


def run(
    arguments: argparse.Namespace, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> int:
    frameworks = chosen(arguments.frameworks, FRAMEWORKS, "--frameworks")
    dtypes = chosen(arguments.dtypes, DTYPES, "--dtypes")
    out = file_to_write(arguments.out, "--out") if arguments.out else None
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        repeats, timeout = arguments.repeats, arguments.timeout
        home = Path(folder)
        margins, problems, versions = measure(
            home, frameworks, dtypes, repeats, timeout, steps_shown(console), implementations
        )
    machine, command = this_machine().one_line, arguments.command
    found = Margins(
        margins=margins, problems=problems, command=command, machine=machine, versions=versions
    )
    print_margins(found, console)
    if out is not None:
        by_hand = explanation_in(out.read_text(encoding="utf-8")) if out.is_file() else ""
        write_file(out, page(found, by_hand))
    is_short = any(not margin.has_room for margin in margins)
    return (
        EXIT_SHORT if is_short or any(REFUSED not in problem for problem in problems) else EXIT_OK
    )
