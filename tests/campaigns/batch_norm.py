"""What batch norm does to a pipeline: the tables and the picture of docs/batch-norm.md.

    python -m tests.campaigns.batch_norm              all three frameworks, each in its own process
    python -m tests.campaigns.batch_norm torch        one of them: prints what it measured

Run it in the repository's root.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.io.figure import new_figure
from common.report.grid import Grid
from common.spec.data import load_corpus
from common.spec.run import FRAMEWORKS, RunConfig, preset
from tests.campaigns.batch_norm_model import (
    Kind,
    Ops,
    gradient_differences,
    oracle_difference,
    train,
)
from tests.campaigns.make_schedules import fill

PAGE = Path("docs/batch-norm.md")
PICTURE = Path("docs/images/batch-norm.png")
COUNTS = (1, 2, 4, 8, 16, 32)
TRAINED: Sequence[tuple[Kind, int]] = (
    ("layer norm", 1),
    ("batch norm", 1),
    ("batch norm", 8),
    ("batch norm", 32),
    ("deferred batch norm", 32),
)
LONGER = 200, 1000, 3000
"""Steps: how the two go on. In PyTorch alone: the others take hours, and do the same."""
LAST = 20
"""Training loss: the mean over so many last steps."""
ONE_BATCH = np.array([[1.0], [3.0], [5.0]])
"""Mean 3; variance 8/3 biased, 4 unbiased. Running statistics begin with 0 and 1."""


def run_config(steps: int = 200) -> RunConfig:
    """Return a small model with a mini-batch of 32 sequences."""
    base = preset("tiny")
    model = base.model.model_copy(update={"context_length": 32, "num_layers": 1})
    train = base.train.model_copy(update={"batch_size": 32, "dtype": "float64", "steps": steps})
    return base.model_copy(update={"model": model, "train": train})


def measure(framework: str) -> dict[str, Any]:
    """Measure one framework, in this process."""
    ops: Ops = importlib.import_module(f"tests.{framework}.plain").Ops()
    config = run_config()
    corpus = load_corpus(config)
    batch = corpus.training_batch(config, 0)
    curves = {f"{kind}, m = {m}": train(ops, config, kind, m, corpus) for kind, m in TRAINED}
    defaults = ops.defaults(ONE_BATCH)
    new_share = float(defaults.running_mean[0]) / 3
    variance = (float(defaults.running_variance[0]) - (1 - new_share)) / new_share
    return {
        "oracle": oracle_difference(ops, config, batch),
        "layer norm": gradient_differences(ops, config, "layer norm", COUNTS, batch),
        "batch norm": gradient_differences(ops, config, "batch norm", COUNTS, batch),
        "curves": {name: losses for name, (losses, _) in curves.items()},
        "held out": {name: held_out for name, (_, held_out) in curves.items()},
        "epsilon": defaults.epsilon,
        "momentum": defaults.momentum,
        "new share": new_share,
        "variance": "biased" if abs(variance - 8 / 3) < 1e-3 else "unbiased",
        "longer": longer(ops) if framework == "torch" else {},
    }


def longer(ops: Ops) -> dict[str, list[str]]:
    """Return training / held-out loss after more and more steps."""
    rows: dict[str, list[str]] = {}
    for kind, m in (TRAINED[0], TRAINED[3]):
        for steps in LONGER:
            config = run_config(steps)
            losses, held_out = train(ops, config, kind, m, load_corpus(config))
            rows.setdefault(f"{kind}, m = {m}", []).append(both(losses, held_out))
    return rows


def both(losses: Sequence[float], held_out: float) -> str:
    return f"{sum(losses[-LAST:]) / LAST:.2f} / {held_out:.2f}"


def gradients_grid(found: Mapping[str, Mapping[str, Any]]) -> Grid:
    cells = [
        [f"{name}, {kind}", *(f"{each:.1e}" if each < 1e-9 else f"{each:.1%}" for each in row)]
        for kind in ("layer norm", "batch norm")
        for name, one in found.items()
        if (row := one[kind][1:])
    ]
    titles = ["gradient against m = 1", *(f"m = {m}" for m in COUNTS[1:])]
    return Grid(titles, cells, titles[:1])


def losses_grid(found: Mapping[str, Mapping[str, Any]]) -> Grid:
    cells = []
    for kind, m in TRAINED:
        name = f"{kind}, m = {m}"
        cells.append([name])
        for one in found.values():
            cells[-1] += [both(one["curves"][name], one["held out"][name])]
    return Grid(["training / held-out loss", *found], cells, ["training / held-out loss"])


def longer_grid(rows: Mapping[str, Sequence[str]]) -> Grid:
    titles = ["training / held-out loss", *(f"{steps:,} steps" for steps in LONGER)]
    return Grid(titles, [[name, *cells] for name, cells in rows.items()], titles[:1])


def same_curves(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how far deferring moves a training curve."""
    worst = max(
        abs(a - b)
        for one in found.values()
        for a, b in zip(
            one["curves"]["batch norm, m = 32"],
            one["curves"]["deferred batch norm, m = 32"],
            strict=True,
        )
    )
    return f"Largest difference of any step's loss, deferred against not, m = 32: {worst:.1g}."


def defaults_grid(found: Mapping[str, Mapping[str, Any]]) -> Grid:
    cells = [
        [
            name,
            f"{one['epsilon']:g}",
            f"{one['momentum']:g}",
            f"{one['new share']:.2f}",
            one["variance"],
        ]
        for name, one in found.items()
    ]
    titles = ("batch norm of", "epsilon", "momentum", "weight of the newest batch", "running var.")
    return Grid(titles, cells, ("batch norm of", "running var."))


def picture(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Gradients of all frameworks, which lie over each other, and the curves of the first."""
    figure = new_figure(11, 3.8)
    left, right, held = figure.subplots(1, 3)
    for (name, one), marker in zip(found.items(), "os^", strict=True):
        for kind, color in (("layer norm", "C0"), ("batch norm", "C1")):
            values = [max(value, 1e-17) for value in one[kind][1:]]
            label = f"{name}, {kind}"
            left.loglog(COUNTS[1:], values, marker=marker, color=color, label=label, alpha=0.6)
    left.set_title("gradient, relative difference to m = 1", fontsize="medium")
    left.set_xlabel("micro-batches m")
    left.set_xticks(COUNTS[1:], [str(m) for m in COUNTS[1:]])
    left.minorticks_off()
    left.yaxis.set_major_formatter("{x:.0e}")
    left.legend(fontsize="x-small")
    first = next(iter(found.values()))
    names = [f"{kind}, m = {m}" for kind, m in TRAINED]
    for name in names:
        losses = np.array(first["curves"][name])
        smooth = np.convolve(losses, np.ones(LAST) / LAST, "valid")
        dash = ":" if name.startswith("deferred") else "-"
        right.plot(range(LAST, len(losses) + 1), smooth, dash, label=name)
    right.set_title(f"training loss (mean of {LAST} steps)", fontsize="medium")
    right.set_xlabel("step")
    right.legend(fontsize="x-small")
    colors = [f"C{i}" for i in range(len(names))]
    bars = held.barh(names, [first["held out"][name] for name in names], color=colors)
    held.bar_label(bars, fmt="%.2f", fontsize="small", padding=2)
    held.invert_yaxis()
    held.margins(x=0.2)
    held.tick_params(axis="y", labelsize="small")
    held.set_title("held-out loss at the end", fontsize="medium")
    figure.savefig(PICTURE, dpi=150)


def main(argv: Sequence[str]) -> int:
    if argv:
        if argv[0] not in FRAMEWORKS:
            raise SystemExit(__doc__)
        print(json.dumps(measure(argv[0])))
        return 0
    found = {}
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    for framework in FRAMEWORKS:
        said = subprocess.run(
            [sys.executable, "-m", "tests.campaigns.batch_norm", framework],
            stdout=subprocess.PIPE,
            env=os.environ | single,  # the products are too small for more
            text=True,
            check=True,
        ).stdout
        found[framework] = json.loads(said.splitlines()[-1])
    write_page(found)
    return 0


def write_page(found: Mapping[str, Mapping[str, Any]]) -> None:
    oracle = max(one["oracle"] for one in found.values())
    check = f"With LayerNorm and m = 1 all three are within {oracle:.0e} of the project's oracle."
    fill("gradients", f"{gradients_grid(found).markdown()}\n{check}", PAGE)
    fill("losses", f"{losses_grid(found).markdown()}\n{same_curves(found)}", PAGE)
    fill("longer", longer_grid(found["torch"]["longer"]).markdown().rstrip(), PAGE)
    fill("defaults", defaults_grid(found).markdown().rstrip(), PAGE)
    picture(found)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
