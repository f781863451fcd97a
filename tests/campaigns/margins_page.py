"""Margins as a table and as docs/margins.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from common.io.console import say
from common.oracle.limits import BFLOAT16_FACTOR
from common.report.grid import Grid
from tests.campaigns.margins import ROOM, Margin, Margins

TITLES = ("framework", "dtype", "check", "worst", "median", "repeats", "the worst: run", "tensor")
INTRODUCTION = """\
# Margins

How much of each limit in [numerics.md](numerics.md) is used: the observed value over its limit, per check of the parity
ladder. Every repeat has other weights, data and dropout masks, and the next model of head, norm, activation and dropout;
2 stages, 4 micro-batches, 4 blocks, 100 steps. `make margins` (`python -m tests.campaigns margins --out docs/margins.md`) makes this page.
"""  # noqa: E501
UNDETERMINED = (
    "The loss curve and the trained parameters leave out {} in float32: a hidden value stands so "
    "close to the kink of a ReLU there that the float64 oracle itself ends elsewhere if its "
    "weights are rounded to float32 after every step, so float32 does not determine where 100 "
    "steps end (numerics.md)."
)
BFLOAT16 = (
    f"In bfloat16 the limit is {BFLOAT16_FACTOR:g} times the smallest error among the frameworks, "
    f"so the best one stands at {1 / BFLOAT16_FACTOR:.2f} by definition, "
    "and there is no fivefold room to ask for."
)


def verdict(margins: Sequence[Margin]) -> str:
    """Return whether every fixed limit has its room, and whether bfloat16 keeps to its rule."""
    fixed = [margin for margin in margins if margin.dtype != "bfloat16"]
    relative = [margin for margin in margins if margin.dtype == "bfloat16"]
    if not relative:
        return _of_fixed(fixed)
    worst = max(relative, key=lambda margin: margin.worst)
    holds = "holds" if worst.has_room else "does not hold"
    used = f"at most {worst.worst:.2f} of what it allows is used ({_name(worst)})"
    return f"{_of_fixed(fixed)} The rule of bfloat16 {holds} in every repeat: {used}."


def _name(margin: Margin) -> str:
    where = f"; {margin.worst_run}; {margin.worst_tensor}"
    return f"{margin.framework} {margin.dtype} {margin.check.replace('_', ' ')}{where}"


def _of_fixed(fixed: Sequence[Margin]) -> str:
    short = [margin for margin in fixed if not margin.has_room]
    if not fixed:
        return "No check with a fixed limit was measured."
    worst = max(fixed, key=lambda margin: margin.worst)
    largest = f"the largest share of a limit is {worst.worst:.3f} ({_name(worst)})"
    if not short:
        return f"Every check has at least {1 / ROOM:g} times room in every repeat: {largest}."
    names = ", ".join(f"{m.framework} {m.dtype} {m.check.replace('_', ' ')}" for m in short)
    return (
        f"{len(short)} of {len(fixed)} checks have less than {1 / ROOM:g} times room: {names}; "
        f"{largest}."
    )


def _cells(margin: Margin) -> tuple[str, ...]:
    check = margin.check.replace("_", " ")
    numbers = (f"{margin.worst:.4f}", f"{margin.median:.4f}", str(margin.repeats))
    return (margin.framework, margin.dtype, check, *numbers, margin.worst_run, margin.worst_tensor)


def _grid(found: Margins) -> Grid:
    styles = ["" if margin.has_room else "red" for margin in found.margins]
    return Grid(TITLES, list(map(_cells, found.margins)), TITLES[:3] + TITLES[6:], styles)


def print_margins(found: Margins, console: Console) -> None:
    console.print(_grid(found).rich())
    for line in (*found.problems, verdict(found.margins)):
        say(console, line)


def page(found: Margins, explanation: str = "") -> str:
    """docs/margins.md. `explanation`: what stands between the markers of the page that is replaced,
    kept as it is.
    """
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
    about = [
        f"- Command: `{found.command}`",
        f"- Machine: {found.machine}",
        f"- Versions: {versions}",
        *(f"- Not measured: {problem}" for problem in found.problems),
    ]
    parts = [
        INTRODUCTION.rstrip(),
        verdict(found.margins),
        f"{BEGIN}\n{explanation}\n{END}".replace("\n\n", "\n"),
    ]
    parts.append(_grid(found).markdown().strip())
    left_out = max((margin.left_out for margin in found.margins), default=0)
    if left_out:
        parts.append(UNDETERMINED.format(f"{left_out} of the repeats"))
    if any(margin.dtype == "bfloat16" for margin in found.margins):
        parts.append(BFLOAT16)
    return "\n\n".join([*parts, "\n".join(about)]) + "\n"


BEGIN, END = "<!-- by hand -->", "<!-- end -->"


def explanation_in(text: str) -> str:
    """Return what a person has written between the markers of an earlier page."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")
