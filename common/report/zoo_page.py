"""The drift zoo's result as a table, as docs/drift.md, and as a picture of the curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from common.io.console import say
from common.io.edges import write_file
from common.io.figure import log_y, new_figure
from common.report.grid import Grid
from common.report.plots import DPI, ORACLE_COLOR
from common.report.zoo import AVERAGED_STEPS, CURVE_STRIDE, GOOD, LADDER_STEPS, Row, Zoo

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PANELS = {
    "the first check that fails: activations": ("activation",),
    "loss or gradients at step 0": ("loss", "gradient"),
    "one optimizer step": ("optimizer_step",),
    "the loss curve": ("loss_curve",),
}
SMALLEST_SHOWN = 1e-15
"""Smaller differences, 0 among them, are below the picture's edge."""

INTRODUCTION = """\
# The drift zoo

Each row puts one numerical habit of a framework, or of its users, back into an implementation that otherwise agrees with
the float64 oracle. Three questions: does the parity ladder notice, does it name the right place first, and what does the
habit cost?

`make drift` makes this page (`triptych drift --out docs`). `triptych drift --list` names the rows, and
`python bench_all.py --drift NAME` runs one in the benchmark. `triptych drift --rows NAME,.. --from docs/drift.json
--out docs` runs some rows and keeps the others.

"""  # noqa: E501

LEGEND = f"""\
*First failure*: the first rung of the ladder that does not hold and the first tensor there, with its relative error and
the limit; unless a row says otherwise, check and place are those that the habit is known for. *Within the limits*: bits
differ, but no rung fails. The baselines (the same runs without the habit) pass every rung; the loss curve is compared over
its first {LADDER_STEPS} steps.
*Cost*: the mean loss of the {AVERAGED_STEPS} steps before, less the baseline's; positive is worse.
± is the standard deviation of that mean between seeds (initial weights, data and masks differ), of the baseline in one
framework: a cost well below it is real, and means nothing for the model.
*Held-out*: the same for the held-out loss after the last step.

Some rows want reading with care. `unscaled-micro-batches` reports m times the loss and `mean-over-all-labels` a part of
it, so only their held-out losses say what they cost. `inverted-attention-mask` lets every token see those that it is to
predict: a better loss, and a model that is worth nothing. `transposed-square-weight`, `swapped-swiglu`,
`tiled-kv-heads` and the rotary rows cost little in a training from scratch, which learns other weights; they ruin
weights that come from elsewhere."""  # noqa: E501


def describe(row: Row) -> str:
    """Describe the result in words."""
    if not row.check:
        return row.verdict
    error = (
        ""
        if row.relative is None or row.limit is None
        else f", {row.relative:.0e} of {row.limit:.0e}"
    )
    words = f"{_rung(row.check, row.place)}{error}"
    if row.verdict == "elsewhere":
        return f"{words} (expected: {_rung(row.expected_check, row.expected_place)})"
    return words if row.verdict == "as expected" else f"{row.verdict}: {words}"


def _rung(check: str, place: str) -> str:
    """`gradient: head.norm.bias`; a loss is its own place."""
    return check.replace("_", " ") + ("" if place == "loss" else f": {place}")


def cost(row: Row, steps: int) -> str:
    """Return `+0.012 ± 0.034`."""
    if steps not in row.cost:
        return ""
    spread = f" ± {row.spread[steps]:.3f}" if steps in row.spread else ""
    return f"{_signed(row.cost[steps])}{spread}"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.0e}"


def _held_out(row: Row) -> str:
    if row.held_out_cost is None:
        return ""
    spread = "" if row.held_out_spread is None else f" ± {row.held_out_spread:.3f}"
    return f"{_signed(row.held_out_cost)}{spread}"


def summary(zoo: Zoo) -> str:
    """Summarize how many habits did what."""
    counts: dict[str, int] = {}
    for row in zoo.rows:
        word = row.verdict.partition(":")[0]
        counts[word] = counts.get(word, 0) + 1
    habits = {row.name for row in zoo.rows if row.verdict == "as expected"}
    words = ", ".join(
        f"{count} {word}" for word, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return (
        f"{len(zoo.rows)} rows: {words}; {len(habits)} different habits fail the ladder where "
        "they should"
    )


def print_zoo(zoo: Zoo, console: Console) -> None:
    console.print(_grid(zoo).without(["whose"]).rich())
    say(console, summary(zoo))


def _grid(zoo: Zoo, titled: bool = False) -> Grid:
    """`titled`: say in words what a habit is, and whose, in its first row."""
    titles = ["habit", "whose", "framework", "dtype", "first failure"]
    cells, shown = [], set()
    for row in zoo.rows:
        is_first = titled and row.name not in shown
        shown.add(row.name)
        name = f"`{row.name}`: {row.title}" if is_first else f"`{row.name}`" if titled else row.name
        whose = (row.default_of or "a common mistake") if is_first else ""
        costs = [cost(row, n) for n in zoo.steps]
        words = [name, whose, row.framework, row.dtype, describe(row)]
        cells.append([*words, *costs, _held_out(row)])
    styles = ["" if row.verdict in GOOD else "red" for row in zoo.rows]
    costs = [f"cost at {n}" for n in zoo.steps]
    return Grid([*titles, *costs, "held-out"], cells, titles, styles)


def write_page(zoo: Zoo, folder: Path) -> None:
    """Write drift.md and images/drift.png."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw_curves(zoo, folder / "images" / "drift.png")
    write_file(folder / "drift.md", page(zoo))


def page(zoo: Zoo) -> str:
    model, train = zoo.config.model, zoo.config.train
    about = [
        f"- Command: `{zoo.command}`",
        f"- Machine: {zoo.machine}",
        "- Versions: "
        f"{', '.join(f'{name} {version}' for name, version in sorted(zoo.versions.items()))}",
        f"- Model: {model.num_layers} blocks, d_model {model.d_model}, {model.num_heads} heads, "
        f"context {model.context_length}; {train.batch_size} sequences in {train.micro_batches} "
        f"micro-batches over {zoo.config.stages} stages; AdamW, peak learning rate "
        f"{train.learning_rate:.4g}, warm-up, cosine; weights perturbed so that no bias is 0 and "
        "no norm's weight 1",
        f"- Seeds for the spread: {zoo.seeds}, in {zoo.spread_framework}",
    ]
    parts = [
        INTRODUCTION + f"{summary(zoo)[0].upper()}{summary(zoo)[1:]}.",
        _grid(zoo, titled=True).markdown().strip(),
        LEGEND,
        "![How far the loss is from the baseline's](images/drift.png)",
        "The picture: the absolute difference of the loss from the baseline's, "
        f"means over {CURVE_STRIDE} steps, one framework per habit. The grey band reaches up to "
        "the spread between seeds.",
        "\n".join(about),
    ]
    return "\n\n".join(parts) + "\n"


def draw_curves(zoo: Zoo, path: Path) -> None:
    """Draw the difference from the baseline (log scale), a panel for each first failed check."""
    figure = new_figure(11.0, 9.6)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    shown = [value for row in zoo.rows for value in row.curve if value > SMALLEST_SHOWN]
    # A little below the smallest, so that no curve runs along the edge.
    bottom = min(shown, default=SMALLEST_SHOWN) / 3
    for panel, (title, checks) in zip(axes.flat, PANELS.items(), strict=True):
        chosen = _one_per_habit(
            row for row in zoo.rows if row.curve and row.expected_check in checks
        )
        _draw_panel(panel, title, chosen, zoo, bottom)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    for panel in axes[:, 0]:
        panel.set_ylabel("|loss - baseline's loss|")
    figure.savefig(path, dpi=DPI)


def _one_per_habit(rows: Iterable[Row]) -> list[Row]:
    """The first framework of each habit in which it was seen."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.name not in found or (row.seen and not found[row.name].seen):
            found[row.name] = row
    return list(found.values())


def _draw_panel(panel: Axes, title: str, rows: Sequence[Row], zoo: Zoo, bottom: float) -> None:
    panel.set_title(title, fontsize=9, loc="left")
    log_y(panel)
    panel.set_ylim(bottom, 30)
    middle = CURVE_STRIDE / 2
    if zoo.spread_curve:
        x = [middle + CURVE_STRIDE * i for i in range(len(zoo.spread_curve))]
        label = "up to the spread between seeds"
        panel.fill_between(
            x, bottom, zoo.spread_curve, color=ORACLE_COLOR, alpha=0.18, linewidth=0, label=label
        )
    for number, row in enumerate(rows):
        x = [middle + CURVE_STRIDE * i for i in range(len(row.curve))]
        color, dash = f"C{number % 10}", ("-", "--", ":")[number // 10]
        panel.plot(
            x,
            row.curve,
            dash,
            color=color,
            linewidth=1.3,
            label=f"{row.name} ({row.framework}, {row.dtype})",
        )
    panel.grid(alpha=0.25, linewidth=0.5)
    if rows:
        panel.legend(
            fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False
        )
