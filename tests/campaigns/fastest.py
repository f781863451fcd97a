"""Which schedule is fastest in fact? Every schedule in every framework, beside a plain loop on one
device with the same cores; makes the table of docs/schedules.md. Run it in the repository's root.

    python -m tests.campaigns.fastest --repeats 5 --partition balanced  measures, some hours
    python -m tests.campaigns.fastest --stages 2 --preset tiny --page X tries it, some minutes
    python -m tests.campaigns.fastest --read results/fastest-...        makes the table alone

It is a benchmark (`bench_all.py --baselines`) for every number of stages, and one more for
schedules that may have more chunks than 2. All options but the ones below are the benchmark's. A
stage wants a core to itself, and nothing else may run: p = 4 needs four idle cores.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli.config import add_options, read_bench
from common.cli.main import main as triptych
from common.cli.parser import Parser
from common.io.usage import UsageError
from common.report.grid import Grid
from common.report.machine import this_machine
from common.schedule.generators import GENERATORS, SEARCH, make_schedule
from common.schedule.simulate import simulate
from tests.campaigns.make_schedules import PAGE, fill

MORE_CHUNKS = 3
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="2,4", metavar="P,..")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="measure nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/schedules.md")
    arguments, options = parser.parse_known_args(argv)
    folder = arguments.read or Path("results") / time.strftime("fastest-%Y%m%d-%H%M%S")
    if arguments.read is None:
        for p in arguments.stages.split(","):
            for chunks in (None, MORE_CHUNKS):
                measure(["--stages", p, *options], chunks, folder)
    rows = [row for path in sorted(folder.glob("*/table.csv")) for row in read(path)]
    if not rows:
        raise SystemExit(f"{folder}: no table.csv of a benchmark with a plain loop in it")
    print(page(rows))
    fill("frameworks", page(rows), arguments.page)
    return 0


def measure(options: Sequence[str], chunks: int | None, folder: Path) -> None:
    """Run the benchmark of all schedules that these options allow."""
    options = ["--baselines", "--out", str(folder), *options]
    options += [] if chunks is None else ["--chunks", str(chunks)]
    names = [
        name
        for name, generator in GENERATORS.items()
        if name != SEARCH and (chunks is None or generator.chunks is None)
    ]
    possible = [name for name in names if is_possible(["--schedules", name, *options])]
    if possible and triptych(["bench", "--schedules", ",".join(possible), *options]) > 1:
        raise SystemExit("the benchmark did not end")  # 1: a row failed, and the table says so


def is_possible(options: Sequence[str]) -> bool:
    parser = Parser(prog="fastest")
    add_options(parser)
    arguments = parser.parse_args(options)
    try:
        read_bench(arguments)
    except UsageError as error:
        print(f"left out: {error}")
        return False
    return True


def read(path: Path) -> list[Row]:
    """Return our rows of a table, with the tokens per second of the plain loop beside them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    plain = {row["framework"]: row["tokens_per_second"] for row in rows if is_plain(row)}
    return [
        row | {"plain": plain.get(row["framework"], "")}
        for row in rows
        if row["executor"] == "table"
    ]


def is_plain(row: Row) -> bool:
    return row["executor"] == "plain" and row["status"] == "ok"


def page(rows: Sequence[Row]) -> str:
    """Return the part of the page: the table, what it shows, and the fastest of each framework."""
    frameworks = list(dict.fromkeys(row["framework"] for row in rows))
    found = {(place(row), row["framework"]): row for row in rows}
    places = sorted(
        {place(row) for row in rows}, key=lambda at: (at[0], list(GENERATORS).index(at[1]), at[2])
    )
    best = {
        (at[0], framework): max(
            (row for (each, f), row in found.items() if (each[0], f) == (at[0], framework)),
            key=share,
        )
        for at in places
        for framework in frameworks
    }
    table = []
    for at in places:
        p, name, v = at
        cells = [cell(found.get((at, framework)), best[p, framework]) for framework in frameworks]
        schedule = make_schedule(name, p, int(rows[0]["micro_batches"]), v)
        busy = 1 - simulate(schedule).bubble_fraction
        table.append([str(p), name, str(v), f"{busy:.2f}", *cells])
    fastest = f"Fastest: {'; '.join(map(words, best.values()))}."
    titles = ("p", "schedule", "v", "F = B = W", *frameworks)
    words_below = [*textwrap.wrap(fastest, 120), "", *textwrap.wrap(legend(rows), 120)]
    return "\n".join([Grid(titles, table, ["schedule"]).markdown(), *words_below])


def place(row: Row) -> tuple[int, str, int]:
    return int(row["stages"]), row["schedule"], int(row["chunks"])


def share(row: Row) -> float:
    """Return the tokens per second over the plain loop's; 0 for a run that does not count."""
    counts = row["status"] == "ok" and row["parity"] == "pass" and row["plain"]
    return float(row["tokens_per_second"]) / float(row["plain"]) if counts else 0.0


def cell(row: Row | None, best: Row) -> str:
    """Return measured / simulated from the run's own costs."""
    if row is None:
        return "-"
    if not share(row):
        return "failed"
    measured = f"**{share(row):.2f}**" if row is best else f"{share(row):.2f}"
    longer = row["simulated_step_difference"]  # none where stages share a GPU
    # A step that takes 1 % longer gives as many tokens less.
    return f"{measured} / {share(row) / (1 + float(longer)):.2f}" if longer else measured


def words(row: Row) -> str:
    name = row["schedule"] + (f" (v = {row['chunks']})" if row["chunks"] != "1" else "")
    return f"{row['framework']} at p = {row['stages']} {name}, {share(row):.2f}"


def legend(rows: Sequence[Row]) -> str:
    one = rows[0]
    return (
        f"Tokens per second over those of a plain loop on one device with the same cores, measured "
        f"/ simulated from the run's own costs; beside them the busy share at F = B = W. m = "
        f"{one['micro_batches']}, {one['batch_size']} sequences, {one['repeats']} repeats, "
        f"{this_machine().one_line}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
