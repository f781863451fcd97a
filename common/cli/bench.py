"""The subcommand bench, which is also `bench_all.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from common.cli.config import add_options, read_bench
from common.cli.parser import Parser
from common.harness.bench import print_dry_run, run_bench
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.io.console import make_console, say

DESCRIPTION = (
    "Trains one Transformer with several frameworks, pipeline schedules and numbers of stages, "
    "each run in a process of its own, compares every run with a float64 oracle, and prints a "
    "table of losses, throughput and memory. Exit status: 0 all well; 1 a run failed or differs "
    "from the oracle; 2 wrong input; 130 interrupted."
)


COMMON = (
    "--help --config --dry-run --preset --repeats --out "
    "--frameworks --schedules --stages --replicas --micro-batches --chunks --dtype --recompute "
    "--device --python --parity --baselines --sweep "
    "--num-layers --d-model --num-heads --d-ff --context-length --dropout --tied-head "
    "--steps --batch-size --learning-rate --corpus --tokenizer-file --seed"
)
"""What most users need; `--help-all` shows the rest."""


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    prepare(subcommands.add_parser("bench", description=DESCRIPTION))


def prepare(parser: Parser, implementations: Mapping[str, Implementation] | None = None) -> None:
    """Add the subcommand's options to the parser, and its action."""
    add_options(parser)
    parser.show_only(set(COMMON.split()))
    parser.set_defaults(run=lambda arguments: _bench(arguments, implementations or IMPLEMENTATIONS))


def _bench(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    bench, console = read_bench(arguments), make_console()
    if bench.left_out:
        say(console, f"left out: {bench.left_out}")
    if bench.dry_run:
        print_dry_run(bench, console)
        return 0
    return run_bench(bench, arguments.command, console, implementations)
