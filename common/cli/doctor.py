"""The subcommand doctor: how fast each framework's kernels are here, and its settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.cli.drift import chosen
from common.cli.numbers import positive
from common.cli.options import add_run_options, file_to_write, read_run
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.harness.roofline import Measured, measure
from common.io.console import make_console, say
from common.io.edges import write_file
from common.report.machine import this_machine
from common.runtime.roofline import PEAKS, Kernel, kernels
from common.spec.gpus import Gpu, visible_gpus
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec

EXIT_OK, EXIT_NOTHING_MEASURED = 0, 1
SLOW = 0.5
"""A share of the fastest framework's rate; slower ones are marked."""
PRESET = "small"
USED = ("dtype", "batch_size", "micro_batches")
"""What of the training decides shapes; of a run itself nothing does: it is always one thread of the
CPU.
"""


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser(
        "doctor",
        description="On one thread, at the shapes of one micro-batch: matrix products and their "
        "gradients in GFLOP/s, and what only reads and writes in GB/s, with the machine's own "
        "rates. A framework below half of the fastest is marked. Exit status: 0, or 1 where no "
        "framework could be measured, 2 wrong input.",
    )
    unused = {*RunConfig.model_fields, *TrainSpec.model_fields, "dropout"} - {*USED}
    add_run_options(parser, without=[*unused], preset=PRESET)
    which, rounds = "which ones (default %(default)s)", "turns of each framework (default 5)"
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), metavar="F,..", help=which)
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help=rounds)
    parser.add_argument("--json", metavar="FILE", help="also write what was measured to FILE")
    parser.set_defaults(run=_doctor)


def _doctor(
    arguments: argparse.Namespace, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> int:
    frameworks = chosen(arguments.frameworks, FRAMEWORKS, "--frameworks")
    config = read_run(arguments, reads_text=False)
    path = file_to_write(arguments.json, "--json") if arguments.json else None
    found = measure(config, frameworks, arguments.rounds, implementations)
    if path is not None:
        write(path, kernels(config), found)
    show(make_console(), config, found)
    measured = [name for name in frameworks if not found[name].error]
    return EXIT_OK if measured else EXIT_NOTHING_MEASURED


def write(path: Path, rows: Sequence[Kernel], found: Mapping[str, Measured]) -> None:
    """Return seconds by framework and kernel, with each framework's environment."""
    said = {
        name: {"error": one.error, "environment": one.environment, "seconds": one.seconds}
        for name, one in found.items()
    }
    work = {kernel.name: {"work": kernel.work, "unit": kernel.unit} for kernel in (*rows, *PEAKS)}
    write_file(path, json.dumps({"kernels": work, "measured": said}, indent=1, default=str) + "\n")


def rate(kernel: Kernel, seconds: float) -> float:
    """Return the rate in the kernel's unit."""
    return kernel.work / seconds / 1e9


def slow(kernel: Kernel, found: Mapping[str, Measured]) -> list[str]:
    """Return the frameworks that take more than twice as long as the fastest."""
    seconds = {
        name: one.seconds[kernel.name] for name, one in found.items() if kernel.name in one.seconds
    }
    return [name for name, own in seconds.items() if min(seconds.values()) / own < SLOW]


def _cards(gpus: Sequence[Gpu]) -> str:
    """The GPUs, as their driver says; what each framework makes of them stands in its own line."""
    if not gpus:
        return "GPUs: none that an NVIDIA driver shows (nvidia-smi)"
    cards = ", ".join(f"{gpu.name} with {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in gpus)
    return f"GPUs: {cards}; driver {gpus[0].driver}; the kernels below are those of the CPU"


def show(console: Console, config: RunConfig, found: Mapping[str, Measured]) -> None:
    """Print the table, what the mark means, and every environment."""
    rows = kernels(config)
    frameworks = [name for name in found if name != "machine" and not found[name].error]
    say(console, f"{this_machine().one_line}; one thread, {config.train.dtype}")
    say(console, _cards(visible_gpus()))
    peaks = found["machine"]
    for kernel in PEAKS if not peaks.error else ():
        console.print(
            f"NumPy: {rate(kernel, peaks.seconds[kernel.name]):.1f} {kernel.unit} ({kernel.name})"
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("kernel", "unit", *frameworks):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    for kernel in rows:
        marked = slow(kernel, found)
        rates = {name: rate(kernel, found[name].seconds[kernel.name]) for name in frameworks}
        cells = (f"{r:.1f}{' slow' if name in marked else ''}" for name, r in rates.items())
        table.add_row(kernel.name, kernel.unit, *cells)
    sums = (sum(k.calls * found[f].seconds[k.name] for k in rows) for f in frameworks)
    cells = (f"{1e3 * seconds:.1f}" for seconds in sums)
    table.add_row("all, as often as a micro-batch needs them", "ms", *cells)
    if frameworks:
        console.print(table)
        why = "that is the framework's kernel, not the pipeline"
        say(console, f"slow: below {SLOW} of the fastest framework; {why}.")
    for name, one in found.items():
        said = one.error or ", ".join(
            f"{key} {value}" for key, value in one.environment.items() if key != "framework"
        )
        if name != "machine":
            say(console, f"{name}: {said}")
