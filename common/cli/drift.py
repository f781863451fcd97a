"""The subcommand drift: every habit of the zoo, switched on one at a time."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from common.cli.numbers import add_timeout, positive
from common.cli.options import check_writable, file_to_write
from common.cli.python import add_python, check_names, chosen_frameworks
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.harness.zoo import base_config, run_zoo, spread_runner
from common.io.console import make_console, say
from common.io.edges import whole_number
from common.io.usage import UsageError, chosen
from common.report.machine import this_machine
from common.report.names import framework_name
from common.report.zoo import GOOD, Row, Zoo
from common.report.zoo_page import print_zoo, write_page
from common.spec.habits import DRIFTS
from common.spec.run import FRAMEWORKS, RunConfig

EXIT_OK, EXIT_UNEXPECTED = 0, 1
PROGRESS_STEPS = 1000
"""Steps of a framework between two lines."""


RUN_OPTIONS: Mapping[str, Any] = {
    "frameworks": ",".join(FRAMEWORKS),
    "rows": "all",
    "steps": "100,500",
    "seeds": 5,
    "timeout": math.inf,
}
"""Options that choose what is run, with their defaults."""
CHOICES = ("rows", "frameworks", "timeout")
"""Those of them that --from goes with."""


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser(
        "drift",
        description="For every habit and framework: the parity ladder with and without it, and "
        "both trained on. Exit status: 0 every habit fails first where it should, 1 one does not, "
        "or a run failed, 2 wrong input.",
    )
    parser.add_argument("--list", action="store_true", help="name the habits and run nothing")
    which = "which ones; torch@PATH is one in another Python (default %(default)s)"
    parser.add_argument("--frameworks", metavar="F,..", help=which)
    parser.add_argument("--rows", metavar="NAME,..", help="which habits (default %(default)s)")
    steps = "where the cost is taken; the last one ends the runs (%(default)s)"
    parser.add_argument("--steps", metavar="N,..", help=steps)
    seeds = "baselines for the spread (default %(default)s)"
    parser.add_argument("--seeds", type=positive, metavar="N", help=seeds)
    out = "write drift.md, drift.json and images/drift.png there"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE")
    source = (
        "run nothing; take the result of an earlier --json. With --rows: run these, and take all "
        "others from there"
    )
    parser.add_argument("--from", dest="source", metavar="FILE", help=source)
    add_timeout(parser)
    add_python(parser)
    parser.set_defaults(run=run, **RUN_OPTIONS)


def run(
    arguments: argparse.Namespace, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> int:
    console = make_console()
    if arguments.list:
        console.print(_listed())
        return EXIT_OK
    json_file = file_to_write(arguments.json, "--json") if arguments.json else None
    folder = _folder(Path(arguments.out)) if arguments.out else None
    if arguments.source:
        zoo, adds = _read(Path(arguments.source)), arguments.rows != RUN_OPTIONS["rows"]
        # With --from, an option that would have no effect is refused, not forgotten.
        for name, default in RUN_OPTIONS.items():
            if getattr(arguments, name) != default and not (adds and name in CHOICES):
                what = "takes this from the file" if adds else "runs nothing"
                raise UsageError(f"--{name}: --from {what}; expected without it")
        if adds:
            arguments.steps, arguments.seeds = ",".join(map(str, zoo.steps)), zoo.seeds
            zoo = _merged(zoo, _run(arguments, console, implementations))
    else:
        zoo = _run(arguments, console, implementations)
    print_zoo(zoo, console)
    if json_file is not None:
        zoo.write(json_file)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        zoo.write(folder / "drift.json")
        write_page(zoo, folder)
        say(console, f"page: {folder / 'drift.md'}")
    return EXIT_OK if all(row.verdict in GOOD for row in zoo.rows) else EXIT_UNEXPECTED


def _folder(path: Path) -> Path:
    """Return the folder: checked before the work, made after it."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise UsageError(f"--out {path}: {there} is a file; expected a folder")
    check_writable(there, f"--out {path}")
    return path


def _read(path: Path) -> Zoo:
    try:
        return Zoo.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--from {path}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise UsageError(f"--from {path}: expected a file that --json has written") from None


def _merged(zoo: Zoo, more: Zoo) -> Zoo:
    """Return the earlier result with the rows of `more` in place of its own, in the zoo's order."""
    rows = {(row.name, row.framework): row for row in (*zoo.rows, *more.rows)}
    drifts = [drift.name for drift in DRIFTS]

    def place(row: Row) -> tuple[int, int]:
        return drifts.index(row.name), FRAMEWORKS.index(row.framework.partition("@")[0])

    names = zoo.versions.keys() | more.versions.keys()
    return zoo.model_copy(
        update={
            "rows": sorted(rows.values(), key=place),
            "command": _both(zoo.command, more.command),
            "machine": _both(zoo.machine, more.machine),
            "versions": {n: _both(zoo.versions.get(n), more.versions.get(n)) for n in names},
        }
    )


def _both(earlier: str | None, later: str | None) -> str:
    return "; ".join(dict.fromkeys(filter(None, (earlier, later))))


def _run(
    arguments: argparse.Namespace, console: Console, implementations: Mapping[str, Implementation]
) -> Zoo:
    runners = chosen_frameworks(arguments.frameworks, arguments, "--frameworks")
    base = base_config(1)

    def named(runner: tuple[str, str | None]) -> RunConfig:
        return base.model_copy(update={"framework": runner[0], "python": runner[1]})

    check_names([named(runner) for runner in runners])
    names = [drift.name for drift in DRIFTS]
    rows = names if arguments.rows == "all" else chosen(arguments.rows, names, "--rows")
    having = {name for drift in DRIFTS if drift.name in rows for name in drift.frameworks}
    if not having & {framework for framework, _ in runners}:
        why = f"not a habit of {arguments.frameworks}"
        raise UsageError(
            f"--rows {arguments.rows}: {why}; expected --frameworks {','.join(sorted(having))}"
        )
    steps = _steps(arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        found, spread, versions = run_zoo(
            Path(folder),
            runners,
            rows,
            steps,
            arguments.seeds,
            arguments.timeout,
            steps_shown(console),
            implementations,
        )
    return Zoo(
        rows=found,
        steps=steps,
        seeds=arguments.seeds,
        spread_framework=framework_name(named(spread_runner(runners))),
        spread_curve=spread,
        command=arguments.command,
        machine=this_machine().one_line,
        versions=versions,
        config=base_config(max(steps)),
    )


def steps_shown(console: Console) -> Callable[[str, int], None]:
    """Return what prints a framework's progress, a line now and then."""

    def stepped(framework: str, done: int) -> None:
        if done % PROGRESS_STEPS == 0:
            console.print(f"{framework}: {done} steps")

    return stepped


def _steps(text: str) -> list[int]:
    steps = {whole_number(word) or 0 for word in text.split(",")}
    if min(steps) < 1:
        raise UsageError(f"--steps {text}: expected whole numbers with commas, such as 100,500")
    return sorted(steps)


def _listed() -> Table:
    titles = ("name", "what", "frameworks", "first failing check", "place", "whose")
    table = Table(*titles, box=None, pad_edge=False)
    for drift in DRIFTS:
        where, whose = ", ".join(drift.frameworks), drift.default_of or "a common mistake"
        table.add_row(drift.name, drift.title, where, drift.check, drift.place, whose)
    return table
