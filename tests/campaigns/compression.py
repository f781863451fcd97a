"""What compressed gradients cost and save: the tables and the picture of docs/compression.md.

    python -m tests.campaigns.compression FOLDER      all of it; as root, for the slow link

Two replicas of the preset tiny: 200 steps in every framework on this machine; then a few steps on
two hosts, which are network namespaces behind a slow link (`tests.campaigns.hosts`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from common.harness.launch import IMPLEMENTATIONS
from common.harness.zoo import run_all
from common.io.figure import new_figure
from common.oracle.compression import ReplicatedOracle
from common.oracle.reference import Oracle
from common.report.grid import Grid
from common.report.machine import this_machine
from common.report.result import RunResult
from common.runtime.job import Job
from common.runtime.training import held_out_batch, starting_weights
from common.spec.data import load_corpus
from common.spec.run import FRAMEWORKS, RunConfig, preset
from common.spec.traffic import traffic_bytes
from tests.campaigns.hosts import slow_link
from tests.campaigns.hosts_page import Link
from tests.campaigns.make_schedules import fill
from tests.hosts import Hosts

PAGE, PICTURE = Path("docs/compression.md"), Path("docs/images/compression.png")
KINDS = ("none", "fp16", "bf16", "powersgd:4", "powersgd:1", "topk:0.1", "topk:0.01", "sign")
KINDS += ("ef-sign",)
TIMED = ("none", "fp16", "powersgd:4", "topk:0.01", "sign")
STEPS, LAST = 200, 20
"""Training loss: the mean over so many last steps."""
MILLISECONDS, MBIT = 5, 10
"""Of the slow link, one way."""
TICKS = (3, 10, 30, 100)
"""Of the picture, in kB."""
TIMED_STEPS, UNTIMED = 14, 4
SEEDS = range(4)
SETTINGS = """
preset = "tiny"
device = "cpu"
stages = 1
replicas = 2
threads = 1
compress = "{compress}"
[train]
steps = {steps}
micro_batches = 2
"""
OPTIMIZERS = {
    "AdamW, 1e-3": {},
    "SGD, 0.3": {"optimizer": "sgd", "learning_rate": 0.3, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class Trained:
    training: float
    held_out: float

    def __str__(self) -> str:
        return f"{self.training:.3f} / {self.held_out:.3f}"


def config_of(framework: str, compress: str, **train: object) -> RunConfig:
    base = preset("tiny")
    run = {"framework": framework, "stages": 1, "replicas": 2, "compress": compress}
    run |= {"device": "cpu", "threads": 2, "schedule": "1f1b"}
    changes = {"steps": STEPS, "micro_batches": 2} | train
    return RunConfig.model_validate(
        base.model_dump() | run | {"train": base.train.model_dump() | changes}
    )


def measured(folder: Path) -> dict[tuple[str, str], Trained]:
    """By framework and kind. Raises SystemExit where a run fails."""
    configs = {(f, kind): config_of(f, kind) for f in FRAMEWORKS for kind in KINDS}
    runs = run_all(
        list(configs.values()), folder, math.inf, noises=dict.fromkeys(configs.values(), 0.0)
    )
    found = {}
    for key, config in configs.items():
        run = runs[config]
        if isinstance(run, str):
            raise SystemExit(f"{key}: {run}")
        found[key] = Trained(fmean(run.losses[-LAST:]), run.held_out_loss)
    return found


def by_oracle(compress: str, train: Mapping[str, object]) -> Trained:
    """The oracle's own training, with other optimizers: the mean over `SEEDS`."""
    found = [_by_oracle(compress, {**train, "seed": seed}) for seed in SEEDS]
    return Trained(fmean(one.training for one in found), fmean(one.held_out for one in found))


def _by_oracle(compress: str, train: Mapping[str, object]) -> Trained:
    config = config_of("torch", compress, dtype="float64", **train)
    weights = starting_weights(Job(config=config, out=""))
    oracle = (
        Oracle(config.model, config.train, weights)
        if compress == "none"
        else ReplicatedOracle(config, weights)
    )
    corpus = load_corpus(config)
    losses = [oracle.train_step(corpus.training_batch(config, step)) for step in range(STEPS)]
    return Trained(fmean(losses[-LAST:]), oracle.evaluate(held_out_batch(config, corpus)))


def step_seconds(hosts: Hosts, folder: Path, framework: str, compress: str, port: int) -> float:
    """The median step of two replicas on two hosts, behind the slow link."""
    name, module = f"{framework}-{port}", IMPLEMENTATIONS[framework].module
    (folder / f"{name}.toml").write_text(SETTINGS.format(compress=compress, steps=TIMED_STEPS))
    workers = [f"10.78.0.{n + 1}:{port}" for n in range(2)]
    started = []
    for n in range(2):
        said = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": n}}
        words = ["-m", module, "train", f"{name}.toml", "--out", name]
        log, env = folder / f"{name}-{n}.log", {"TF_CONFIG": json.dumps(said)}
        started.append(hosts.start(n, words, log, env))
    if any([process.wait() for process in started]):  # noqa: C419  wait for both
        raise SystemExit(f"{framework}, {compress}: failed; see {folder}/{name}-0.log")
    steps = RunResult.read(next(folder.glob(f"{name}/*/*/result.json"))).steps
    return median(step.seconds for step in steps[UNTIMED:])


def over_slow_link(folder: Path) -> dict[tuple[str, str], float]:
    found = {}
    with Hosts(2, "g") as hosts, slow_link(hosts, Link(MILLISECONDS, MBIT), folder):
        for number, (framework, kind) in enumerate((f, k) for f in FRAMEWORKS for k in TIMED):
            port = 29_400 + 10 * number
            found[framework, kind] = step_seconds(hosts, folder, framework, kind, port)
            print(framework, kind, f"{found[framework, kind]:.3f} s", flush=True)
    return found


def kilobytes(compress: str) -> float:
    """What each replica sends in a step."""
    return traffic_bytes(config_of("torch", compress))[0, 1] / 1e3


def losses_grid(found: Mapping[tuple[str, str], Trained]) -> Grid:
    whole = kilobytes("none")
    cells = [
        [
            f"`{kind}`",
            f"{kilobytes(kind):,.1f}",
            f"1/{whole / kilobytes(kind):.1f}",
            *(str(found[framework, kind]) for framework in FRAMEWORKS),
            f"{found['torch', kind].training - found['torch', 'none'].training:+.2f}",
        ]
        for kind in KINDS
    ]
    titles = ["`--compress`", "kB a step", "of none", *FRAMEWORKS, "training, to none"]
    return Grid(titles, cells, titles[:1])


def seconds_grid(found: Mapping[tuple[str, str], float]) -> Grid:
    cells = [[f"`{k}`", *(f"{found[f, k] * 1e3:,.0f}" for f in FRAMEWORKS)] for k in TIMED]
    return Grid(["step, ms", *FRAMEWORKS], cells, ["step, ms"])


def optimizers_grid(kinds: Sequence[str]) -> Grid:
    cells = [[f"`{k}`", *(str(by_oracle(k, t)) for t in OPTIMIZERS.values())] for k in kinds]
    titles = ["training / held-out loss", *OPTIMIZERS]
    return Grid(titles, cells, titles[:1])


def picture(found: Mapping[tuple[str, str], Trained]) -> None:
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for framework, marker in zip(FRAMEWORKS, "os^", strict=True):
        y = [found[framework, kind].held_out for kind in KINDS]
        x = [kilobytes(kind) for kind in KINDS]
        axes.semilogx(x, y, marker, label=framework, alpha=0.5)
    for kind in KINDS:
        # The two casts, and the two signs, send as many bytes.
        place = {"bf16": (0, -12), "ef-sign": (0, 7)}.get(kind, (4, 4))
        at = kilobytes(kind), found["torch", kind].held_out
        axes.annotate(kind, at, place, textcoords="offset points", fontsize="small")
    axes.set_xlabel("kB that a replica sends in a step")
    axes.set_ylabel(f"held-out loss after {STEPS} steps")
    axes.set_xticks(TICKS, list(map(str, TICKS)))
    axes.minorticks_off()
    axes.margins(0.12)
    axes.legend(fontsize="small")
    figure.savefig(PICTURE, dpi=150)


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0]).resolve()
    folder.mkdir(parents=True)
    machine = f"\nMeasured on {this_machine().one_line}."
    found = measured(folder / "trained")
    picture(found)
    fill("losses", losses_grid(found).markdown() + machine, PAGE)
    optimizers = optimizers_grid(("none", "sign", "ef-sign")).markdown().rstrip()
    fill("optimizers", optimizers, PAGE)
    seconds = seconds_grid(over_slow_link(folder))
    fill("seconds", seconds.markdown() + machine, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
