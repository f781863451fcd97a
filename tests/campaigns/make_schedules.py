"""Remakes what docs/schedules.md shows: its drawings, its tables and its curve. Run it in the
repository's root.

    python -m tests.campaigns.make_schedules            everything, some minutes (the searches take most of them)
    python -m tests.campaigns.make_schedules drawings published   only these parts

Tables stand between `<!-- made: NAME -->` and `<!-- end -->`; pictures are files in docs/images/.
"""  # noqa: E501

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.cli.main import main as triptych
from common.io.edges import write_file
from common.io.figure import new_figure
from common.report.grid import Grid
from common.schedule.bound import lower_bound
from common.schedule.draw import draw_text
from common.schedule.explain import EXPLANATIONS
from common.schedule.generators import (
    GENERATORS,
    SEARCH,
    default_chunks,
    make_schedule,
    named_schedules,
)
from common.schedule.search import limits, search, shops
from common.schedule.simulate import Costs, simulate
from common.schedule.validate import validate

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "schedules.md"
IMAGES = DOCS / "images"
GOLDEN = DOCS.parent / "tests" / "golden"
STAGES, MICRO_BATCHES = 4, 8
DRAWN = tuple(name for name in GENERATORS if name != SEARCH)
PUBLISHED = ("1f1b", "interleaved", "zb-h1", "zb-h2")


def drawings() -> None:
    """One picture per schedule, each by `triptych draw`, and the text chart of 1f1b."""
    for name in DRAWN:
        m = 2 if name == "naive" else MICRO_BATCHES
        words = f"draw --schedule {name} --stages {STAGES} --micro-batches {m} --output".split()
        if status := triptych([*words, str(IMAGES / f"schedule-{name}.png")]):
            raise SystemExit(status)
    chart = draw_text(make_schedule("1f1b", STAGES, MICRO_BATCHES))
    fill("text-chart", f"```text\n{chart}\n```")


def explanations() -> None:
    """What `triptych explain` says, a part for every schedule that is drawn."""
    for name in DRAWN:
        explanation = EXPLANATIONS[name]
        lines = [
            f"*{explanation.source[0].upper()}{explanation.source[1:]}.*",
            "",
            *textwrap.wrap(explanation.text, 120),
            "",
            "| | formula | holds for |",
            "| --- | --- | --- |",
        ]
        for formula in explanation.formulas:
            holds = formula.condition_shown or "all m"
            lines.append(f"| {formula.measure} | {formula.shown} | {holds} |")
        fill(name, "\n".join(lines))


def published() -> None:
    """Published against simulated bubbles, all rows and schedules."""
    lines = []
    for row in rows():
        cells, as_run = [], "-"
        for name in PUBLISHED:
            if name not in row["bubble_fraction"]:
                cells.append("-")
                continue
            v = row["layers"] // row["stages"] if name == "interleaved" else 1
            schedule = make_schedule(name, row["stages"], row["micro_batches"], v)
            found = simulate(schedule, costs_of(row), wrap_around="first")
            is_warm = name == "zb-h2"
            got = found.warm_start_bubble_fraction if is_warm else found.bubble_fraction
            cells.append(f"{row['bubble_fraction'][name]:.4f} / {got:.4f}")
            if name == "interleaved":
                as_run = f"{simulate(schedule, costs_of(row)).bubble_fraction:.4f}"
        lines.append([str(row["stages"]), str(row["micro_batches"]), *cells, as_run])
    fill_table("published", ["p", "m", *PUBLISHED, "interleaved as it runs"], lines)


SHARES = {"1/2": 0.5, "2/3": 2 / 3, "1": 1.0, "2": 2.0}
"""Memory limits, in units of 1f1b's peak."""


def searches() -> None:
    """The search's bubbles at several memory limits, the best named schedule that fits, and the
    lower bound.
    """
    lines = []
    for row in rows():
        p, m, costs = row["stages"], row["micro_batches"], costs_of(row)
        if m > 24:  # the others say the same, in half an hour
            continue
        whole = float(costs.per_micro_batch.mean()) * m
        for memory, share in SHARES.items():
            limit = limits(p, m, [share])
            began = time.perf_counter()
            found = simulate(search(p, m, costs, limit), costs)
            seconds = time.perf_counter() - began
            bubble, name = min(named_bubbles(p, m, costs, limit))
            bound = 1 - whole / min(map(lower_bound, shops(p, m, costs, limit)))
            warm = ("-", "-")
            if share == 2.0:  # one chunk, as in the paper
                best = simulate(search(p, m, costs, limit, [1], "warm"), costs)
                published = row["bubble_fraction"]["zb-2p"]
                warm = (f"{published:.4f}", f"{best.warm_start_bubble_fraction:.4f}")
            plain = (f"{name} {bubble:.4f}", f"{found.bubble_fraction:.4f}", f"{bound:.4f}")
            lines.append([str(p), str(m), memory, *plain, *warm, f"{seconds:.0f}"])
            print(*lines[-1], flush=True)
    titles = ("p", "m", "memory", "best named schedule", "search", "bound", "zb-2p published")
    fill_table("searches", (*titles, "search, warm", "seconds"), lines)


def named_bubbles(
    p: int, m: int, costs: Costs, limit: Sequence[float]
) -> Iterator[tuple[float, str]]:
    """Yield (bubble fraction, name) of every schedule with one or two chunks that fits."""
    for schedule in (*named_schedules(p, m, 1, costs), *named_schedules(p, m, 2, costs)):
        simulation = simulate(schedule, costs)
        if all(a <= b for a, b in zip(simulation.peak_memory_per_stage, limit, strict=True)):
            yield simulation.bubble_fraction, schedule.name


def curve() -> None:
    """Time to generate, validate and simulate against the number of actions."""
    steps: dict[str, list[float]] = {"generate": [], "validate": [], "simulate": []}
    actions, lines = [], []
    for m in (64, 128, 256, 512, 1024, 2048, 4096):
        began = time.perf_counter()
        schedule = make_schedule("interleaved", 64, m, 4)
        generated = time.perf_counter()
        if validate(schedule):
            raise SystemExit(f"interleaved is not valid for m = {m}")
        validated = time.perf_counter()
        simulate(schedule, check=False)
        simulated = time.perf_counter()
        actions.append(schedule.num_actions)
        seconds = (generated - began, validated - generated, simulated - validated)
        for name, spent in zip(steps, seconds, strict=True):
            steps[name].append(spent)
        lines.append([str(m), f"{schedule.num_actions:,}", *(f"{s:.2f} s" for s in seconds)])
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for (name, values), marker in zip(steps.items(), "os^", strict=True):
        axes.loglog(actions, values, marker=marker, label=name)
    slope = [steps["simulate"][-1] * n / actions[-1] for n in actions]
    axes.loglog(actions, slope, color="gray", linestyle=":", label="proportional to the actions")
    axes.set_xlabel("actions (p = 64, v = 4, m = 64 to 4096)")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "schedule-curve.png", dpi=130)
    fill_table("curve", ["m", "actions", *steps], lines)


def overview() -> None:
    """All schedules side by side at the size of the drawings."""
    bubbles = ("bubble fraction", "with a warm start")
    titles = ("schedule", "chunks", *bubbles, "peak in flight, stage 0 to 3", "peak memory")
    lines = []
    for name in DRAWN:
        simulation = simulate(make_schedule(name, STAGES, MICRO_BATCHES, default_chunks(name)))
        peaks = ", ".join(f"{peak:g}" for peak in simulation.peak_in_flight_per_stage)
        fractions = (simulation.bubble_fraction, simulation.warm_start_bubble_fraction)
        cold, warm = (f"{fraction:.4f}" for fraction in fractions)
        memory = f"{max(simulation.peak_memory_per_stage):g}"
        lines.append([name, str(simulation.schedule.num_chunks), cold, warm, peaks, memory])
    fill_table("overview", titles, lines, words=(titles[0], titles[4]))


def rows() -> Iterator[dict[str, Any]]:
    for name in ("zero_bubble_tables.json", "zero_bubble_more_rows.json"):
        yield from json.loads((GOLDEN / name).read_text(encoding="utf-8"))["rows"]


def costs_of(row: dict[str, Any]) -> Costs:
    return Costs.uniform(row["stages"], **row["milliseconds"])


def fill_table(
    name: str, titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()
) -> None:
    """Replace the table `name`, in which `words` are the titles of the columns of words."""
    fill(name, Grid(titles, rows, words).markdown().strip())


def fill(name: str, content: str, page: Path = PAGE) -> None:
    """Replace the part `name` of a page."""
    part = re.compile(rf"(<!-- made: {name} -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)
    text, found = part.subn(
        lambda match: match[1] + content + "\n" + match[2], page.read_text(encoding="utf-8")
    )
    if found != 1:
        raise SystemExit(f"{page}: {found} parts named {name}; expected 1")
    write_file(page, text)


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part for part in (drawings, explanations, overview, published, curve, searches)
}

if __name__ == "__main__":
    if wrong := set(sys.argv[1:]) - PARTS.keys():
        raise SystemExit(f"{', '.join(wrong)}: no part; expected one of {', '.join(PARTS)}")
    for part_name in sys.argv[1:] or PARTS:
        PARTS[part_name]()
