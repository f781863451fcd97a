"""The subcommand doctor: what is installed, where it computes, and how fast its kernels are."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from common.cli.numbers import natural
from common.cli.options import add_run_options, file_to_write, read_run
from common.cli.python import check_names, chosen_frameworks
from common.harness.interpreters import Installation, installation
from common.harness.kernel_times import Measured, measure
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.io.console import make_console, say
from common.io.edges import write_file
from common.report.grid import Grid
from common.report.machine import this_machine
from common.report.names import framework_name
from common.runtime.kernels import PEAKS, Kernel, kernels
from common.spec.gpus import Gpu, counted, visible_gpus
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec

EXIT_OK, EXIT_NOTHING_THERE = 0, 1
SLOW = 0.5
"""A share of the rate of the fastest framework on the same device; slower ones are marked."""
PRESET = "small"
USED = ("dtype", "batch_size", "micro_batches", "device")
"""What of the training decides shapes, and where they are computed: a GPU, or one CPU thread."""


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser(
        "doctor",
        description="For each framework: whether it is there, in which Python, which version, for "
        "which CUDA, and what to do. Then its kernels at the shapes of one micro-batch, on a GPU "
        "or one thread: matrix products and their gradients in GFLOP/s, and what only reads and "
        "writes in GB/s, with the machine's own rates. A framework below half of the fastest is "
        "marked. Exit status: 0, or 1 where no framework is there, 2 wrong input.",
    )
    add_run_options(
        parser,
        without=[
            name
            for name in (*RunConfig.model_fields, *TrainSpec.model_fields, "dropout")
            if name not in USED
        ],
        preset=PRESET,
    )
    parser.add_argument(
        "--frameworks",
        default=",".join(FRAMEWORKS),
        metavar="F,..",
        help="which ones (default %(default)s); torch@PATH: in this Python",
    )
    parser.add_argument(
        "--rounds",
        type=natural,
        default=5,
        metavar="N",
        help="turns of each framework; 0 measures nothing (default %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was found to FILE")
    parser.set_defaults(run=_doctor)


def _doctor(
    arguments: argparse.Namespace, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> int:
    config = read_run(arguments, reads_text=False)
    runs = [
        config.model_copy(update={"framework": framework, "python": python})
        for framework, python in chosen_frameworks(arguments.frameworks, arguments, "--frameworks")
    ]
    check_names(runs)
    named = {framework_name(run): run for run in runs}
    path = file_to_write(arguments.json, "--json") if arguments.json else None
    console, gpus = make_console(), visible_gpus()
    there = {name: look_for(run, gpus, implementations) for name, run in named.items()}
    show_installed(console, there, gpus)
    found: dict[str, Measured] = {}
    if arguments.rounds:
        measured = {name: run for name, run in named.items() if there[name].version}
        if measured:
            found = measure(measured, arguments.rounds, implementations)
            show_kernels(console, config, found)
    if path is not None:
        write(path, kernels(config), found, there)
    works = [name for name in named if there[name].version]
    if arguments.rounds:
        works = [name for name in works if not found[name].error]
    return EXIT_OK if works else EXIT_NOTHING_THERE


def look_for(
    run: RunConfig, gpus: Sequence[Gpu], implementations: Mapping[str, Implementation]
) -> Installation:
    """Look for the framework of a run."""
    one = implementations[run.framework]
    return installation(one.module, one.package, one.install, run.python, gpus)


def write(
    path: Path,
    rows: Sequence[Kernel],
    found: Mapping[str, Measured],
    there: Mapping[str, Installation],
) -> None:
    """Write what is installed, and seconds by framework and kernel with its environment."""
    said = {
        name: {"error": one.error, "environment": one.environment, "seconds": one.seconds}
        for name, one in found.items()
    }
    work = {kernel.name: {"work": kernel.work, "unit": kernel.unit} for kernel in (*rows, *PEAKS)}
    content = {
        "installed": {name: asdict(one) for name, one in there.items()},
        "kernels": work,
        "measured": said,
    }
    write_file(path, json.dumps(content, indent=1, default=str) + "\n")


# ------------------------------------------------------------------------------- what is installed


def _cards(gpus: Sequence[Gpu]) -> str:
    """The GPUs, as their driver says."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES = {hidden!r}"
    if not gpus:
        return f"GPUs: none that an NVIDIA driver shows (nvidia-smi){limited}"
    cards = ", ".join(f"{gpu.name} with {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in gpus)
    return f"GPUs: {cards}; driver {gpus[0].driver}{limited}"


def show_installed(
    console: Console, there: Mapping[str, Installation], gpus: Sequence[Gpu]
) -> None:
    """Print the machine, a line for each framework, and what to do."""
    say(console, this_machine().one_line)
    say(console, _cards(gpus))
    titles = ("framework", "version", "Python", "CUDA", "NCCL", "computes on", "interpreter")
    rows = []
    for name, one in there.items():
        said = ["not found", "", "", "", ""]
        if one.version and one.answer:
            build = (one.answer.cuda or "CPU build", one.answer.nccl)
            place = counted(gpus) if gpus and not one.advice else "CPU"
            said = [one.version, one.answer.python, *build, place]
        rows.append([name, *said, one.interpreter])
    console.print(Grid(titles, rows, titles).rich())
    for name, one in there.items():
        if one.advice:
            say(console, f"{name}: {one.advice}")


# -------------------------------------------------------------------------------------- its kernels


def rate(kernel: Kernel, seconds: float) -> float:
    """Return the rate in the kernel's unit."""
    return kernel.work / seconds / 1e9


def slow(kernel: Kernel, found: Mapping[str, Measured]) -> list[str]:
    """Return the frameworks that take more than twice as long as the fastest on such a device."""
    seconds = {
        name: (device_of(one), one.seconds[kernel.name])
        for name, one in found.items()
        if kernel.name in one.seconds
    }
    fastest: dict[str, float] = {}
    for device, own in seconds.values():
        fastest[device] = min(own, fastest.get(device, own))
    return [name for name, (device, own) in seconds.items() if fastest[device] / own < SLOW]


def device_of(one: Measured) -> str:
    """Return the card's name, or "CPU"."""
    said = one.environment
    return str(said.get("device_name")) if "cuda" in str(said.get("device_kind")) else "CPU"


def show_kernels(console: Console, config: RunConfig, found: Mapping[str, Measured]) -> None:
    """Print the table, what the mark means, and every environment."""
    rows = kernels(config)
    frameworks = [name for name in found if name != "machine" and not found[name].error]
    console.print(f"\nkernels on a GPU or one thread, {config.train.dtype}")
    peaks = found["machine"]
    for kernel in PEAKS if not peaks.error else ():
        console.print(
            f"NumPy: {rate(kernel, peaks.seconds[kernel.name]):.1f} {kernel.unit} ({kernel.name})"
        )
    cells = []
    for kernel in rows:
        marked = slow(kernel, found)
        rates = [
            f"{rate(kernel, found[name].seconds[kernel.name]):.1f}" + " slow" * (name in marked)
            for name in frameworks
        ]
        cells.append([kernel.name, kernel.unit, *rates])
    sums = [sum(one.calls * found[name].seconds[one.name] for one in rows) for name in frameworks]
    needed = [f"{1e3 * seconds:.1f}" for seconds in sums]
    cells.append(["all, as often as a micro-batch needs them", "ms", *needed])
    if frameworks:
        titles = [f"{name} ({device_of(found[name])})" for name in frameworks]
        console.print(Grid(["kernel", "unit", *titles], cells, ["kernel"]).rich())
        say(
            console,
            f"slow: below {SLOW} of the fastest framework on the same device; that is the "
            "framework's kernel, not the pipeline.",
        )
    for name, one in found.items():
        said = one.error or ", ".join(
            f"{key} {value}" for key, value in one.environment.items() if key != "framework"
        )
        if name != "machine":
            say(console, f"{name}: {said}")
