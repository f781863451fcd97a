"""The campaign relay: training that changes framework, number of stages and schedule on the way,
against the oracle.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from common import checkpoint
from common.cli.numbers import add_timeout
from common.cli.options import PLACEMENT, add_run_options, read_run
from common.cli.settings import Key
from common.cli.train import drop_tensors, run_training
from common.harness.bench import make_folder
from common.harness.launch import (
    IMPLEMENTATIONS,
    ORACLE_MODULE,
    Implementation,
    stop_on_signals,
    why_missing,
)
from common.harness.restarts import Trained, Training
from common.io.console import make_console, say
from common.io.edges import whole_number, write_file
from common.io.usage import UsageError, closest
from common.report.compare import oracle_config, why_not_comparable
from common.report.grid import Grid
from common.report.machine import git_commit, this_machine
from common.report.progress import progress_view
from common.runtime.text import write_text
from common.schedule.generators import default_chunks
from common.spec.data import load_corpus
from common.spec.rules import why_impossible
from common.spec.run import FRAMEWORKS, RunConfig, explain
from tests.campaigns import relay_page as report
from tests.campaigns.relay_page import Leg, Relay

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130

DEFAULT_LEGS = "torch:p=2:1f1b:100,paddle:p=4:1f1b:200,tensorflow:p=3:interleaved:300"
DEFAULTS: Mapping[Key, Any] = {
    ("model", "context_length"): 32,
    ("model", "num_layers"): 4,
    ("model", "d_model"): 48,
    ("model", "num_heads"): 4,
    ("model", "d_ff"): 96,
    ("model", "dropout"): 0.1,
    ("train", "batch_size"): 12,
    ("train", "micro_batches"): 6,
    ("train", "dtype"): "float64",
    ("train", "learning_rate"): 2e-3,
    ("train", "learning_rate_schedule"): "cosine",
    ("train", "warmup_steps"): 20,
}
"""Small, with six units, so that three stages of two chunks can be cut; dropout, so that its masks
have to go on too.
"""

DESCRIPTION = (
    "Trains one model with several frameworks in turn, each on its own number of stages and with "
    "its own schedule, handing over by checkpoints; compares losses and weights with the oracle, "
    "which does all steps alone. Exit status: 0 within the limits of the parity ladder; 1 "
    "outside, or a leg failed; 2 wrong input."
)


@dataclass(frozen=True)
class _Plan:
    """One leg as the user gives it."""

    framework: str
    stages: int
    schedule: str
    chunks: int
    micro_batches: int | None
    steps_done: int


def register(
    subcommands: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> None:
    """Add the campaign to argparse's subparsers."""
    parser = subcommands.add_parser("relay", description=DESCRIPTION, usage="%(prog)s [options]")
    parser.add_argument(
        "--legs",
        metavar="LEG,..",
        default=DEFAULT_LEGS,
        help="FRAMEWORK:p=STAGES:SCHEDULE:STEPS_DONE, with :m=MICRO_BATCHES or :v=CHUNKS where "
        f"they are not the default (default: {DEFAULT_LEGS})",
    )
    where = "where its folder goes (default: results)"
    parser.add_argument("--out", metavar="FOLDER", default="results", help=where)
    add_timeout(parser, "leg")
    without = [*PLACEMENT, "steps", "executor", "track", "drift"]
    add_run_options(parser, without=without, defaults=DEFAULTS)
    parser.set_defaults(run=lambda arguments: _relay(arguments, implementations))


def _read_legs(text: str) -> list[_Plan]:
    """Raises UsageError."""
    legs: list[_Plan] = []
    for word in text.split(","):
        parts = word.strip().split(":")
        numbers = dict(part.split("=", 1) for part in parts if "=" in part)
        names = [part for part in parts if "=" not in part]
        known = set(numbers) <= {"p", "m", "v"} and all(map(whole_number, numbers.values()))
        if len(names) == 3 and names[0] not in FRAMEWORKS:
            raise UsageError(f"--legs: {names[0]!r}: unknown{closest(names[0], FRAMEWORKS)}")
        if len(names) != 3 or not known or not whole_number(names[2]):
            raise UsageError(
                f"--legs: {word!r}; expected FRAMEWORK:p=STAGES:SCHEDULE:STEPS_DONE, such as "
                "torch:p=2:1f1b:100"
            )
        legs.append(
            _Plan(
                framework=names[0],
                stages=whole_number(numbers.get("p", 1)) or 1,
                schedule=names[1],
                chunks=whole_number(numbers.get("v", default_chunks(names[1]))) or 1,
                micro_batches=whole_number(numbers.get("m")),
                steps_done=whole_number(names[2]) or 0,
            )
        )
    ends = [0, *(leg.steps_done for leg in legs)]
    if any(a >= b for a, b in itertools.pairwise(ends)):
        raise UsageError(f"--legs: they end after {ends[1:]} steps; expected increasing numbers")
    return legs


def _config(base: RunConfig, leg: _Plan) -> RunConfig:
    """The leg's run, with one thread per stage, so that its bits do not depend on the machine.
    Raises UsageError.
    """
    fields = asdict(leg)
    m, _ = fields.pop("micro_batches"), fields.pop("steps_done")
    train = base.train.model_dump() | ({"micro_batches": m} if m else {})
    fields |= {"threads": leg.stages, "train": train}
    try:
        config = RunConfig.model_validate(base.model_dump() | fields)
    except ValidationError as error:
        raise UsageError(f"--legs: {leg.framework}: {explain(error).splitlines()[0]}") from None
    if impossible := why_impossible(config):
        raise UsageError(f"--legs: {leg.framework}: {impossible}")
    if reason := why_not_comparable(config):
        raise UsageError(f"--legs: {reason}")
    return config


def _relay(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    console = make_console()
    plans = _read_legs(arguments.legs)
    steps = plans[-1].steps_done
    # As if it were an option: what is given has to fit it, the rest follows.
    setattr(arguments, "train.steps", steps)
    warmup: dict[Key, Any] = {("train", "warmup_steps"): min(20, steps // 2)}
    base = read_run(arguments, defaults={**DEFAULTS, **warmup})
    configs = [_config(base, leg) for leg in plans]
    for config in configs:
        missing = why_missing(implementations[config.framework], config.executor, config.python)
        if missing:
            raise UsageError(missing)
    folder = make_folder(Path(arguments.out), "relay")
    say(console, f"results in {folder}/")
    runs = _run(configs, plans, folder, implementations, arguments.timeout, console)
    oracle, legs = runs[0], runs[1:]
    if any(run.interrupted for run in runs):
        return EXIT_INTERRUPTED
    if len(legs) < len(plans) or any(run.outcome.status != "ok" for run in runs):
        say(console, f"failed: {runs[-1].outcome.reason} (log: {runs[-1].outcome.log})")
        return EXIT_FAILED
    relay = _judged(configs, plans, oracle, legs, folder, arguments.command)
    write_file(folder / "relay.json", relay.model_dump_json(indent=1) + "\n")
    report.draw_relay(relay, folder / "relay.png")
    _show(relay, folder, console)
    return EXIT_OK if relay.passed else EXIT_FAILED


def _run(
    configs: list[RunConfig],
    plans: list[_Plan],
    folder: Path,
    implementations: Mapping[str, Implementation],
    timeout_seconds: float,
    console: Console,
) -> list[Trained]:
    """The oracle's run and then the legs', up to the first that does not end well."""
    saves, text = folder / "checkpoints", write_text(load_corpus(configs[0]), folder)
    shared = {"text": text, "timeout_seconds": timeout_seconds}
    trainings = [
        Training(
            config=oracle_config(configs[0]),
            module=ORACLE_MODULE,
            folder=folder / "oracle",
            directory=folder / "oracle-checkpoints",
            save_every=math.gcd(*(leg.steps_done for leg in plans)),
            keep=plans[-1].steps_done,
            **shared,
        )
    ]
    for number, (config, leg) in enumerate(zip(configs, plans, strict=True)):
        before = saves / f"step-{plans[number - 1].steps_done:08}" if number else None
        trainings.append(
            Training(
                config=config,
                module=implementations[config.framework].module,
                folder=folder / f"leg-{number + 1}",
                directory=saves,
                resume=before,
                stop_at=leg.steps_done,
                keep=len(plans),
                **shared,
            )
        )
    done: list[Trained] = []
    with stop_on_signals() as stopped, progress_view(console, len(trainings)) as view:
        for training in trainings:
            done.append(run_training(training, view, stopped, "oracle" if not done else None))
            if done[-1].interrupted or done[-1].outcome.status != "ok":
                break
    for training in trainings:
        drop_tensors(training)
    return done


def _judged(
    configs: list[RunConfig],
    plans: list[_Plan],
    oracle: Trained,
    trained: list[Trained],
    folder: Path,
    command: str,
) -> Relay:
    expected = [record.loss for record in oracle.steps]
    loss_limit, weight_limit = report.limits(configs[0].train.dtype)
    legs, first = [], 0
    for config, plan, run in zip(configs, plans, trained, strict=True):
        losses = [record.loss for record in run.steps]
        name = f"step-{plan.steps_done:08}"
        loss, place = report.largest_loss_difference(losses, expected[first : plan.steps_done])
        weight, tensor = report.largest_weight_difference(
            checkpoint.load(folder / "checkpoints" / name).weights,
            checkpoint.load(folder / "oracle-checkpoints" / name).weights,
        )
        legs.append(
            Leg(
                config=config,
                first_step=first,
                steps_done=plan.steps_done,
                losses=tuple(losses),
                loss_difference=loss,
                loss_difference_step=first + place + 1,
                weight_difference=weight,
                weight_difference_name=tensor,
                version=str(run.outcome.parts[0].environment.get("version", "")),
                seconds=run.outcome.wall_seconds,
            )
        )
        first = plan.steps_done
    return Relay(
        legs=tuple(legs),
        oracle_losses=tuple(expected),
        loss_limit=loss_limit,
        weight_limit=weight_limit,
        passed=all(
            leg.loss_difference <= loss_limit and leg.weight_difference <= weight_limit
            for leg in legs
        ),
        command=command,
        machine=this_machine(),
        git_commit=git_commit(),
    )


def _show(relay: Relay, folder: Path, console: Console) -> None:
    console.print(Grid(report.TITLES, report.summary(relay), report.TITLES).rich())
    worst = max(relay.legs, key=lambda leg: leg.loss_difference)
    weights = max(leg.weight_difference for leg in relay.legs)
    verdict = "pass" if relay.passed else "FAIL"
    say(
        console,
        f"{verdict}: losses differ from {len(relay.oracle_losses)} uninterrupted steps of the "
        f"oracle by at most {worst.loss_difference:.1e} (step {worst.loss_difference_step}, "
        f"{worst.config.framework}; limit {relay.loss_limit:g}), weights by at most {weights:.1e} "
        f"(limit {relay.weight_limit:g})",
    )
    say(console, f"curve: {folder / 'relay.png'}; numbers: {folder / 'relay.json'}")
