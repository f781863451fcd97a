"""The subcommand train: one run of one framework, with checkpoints, new or continued."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from common import checkpoint
from common.checkpoint import Manifest
from common.cli.numbers import add_timeout, natural, positive, seconds
from common.cli.options import add_run_options, read_run, reporting
from common.cli.saved import Saved, load_text
from common.harness import restarts
from common.harness.bench import describe, make_folder, run_name
from common.harness.launch import (
    IMPLEMENTATIONS,
    Implementation,
    stop_on_signals,
    why_missing,
)
from common.harness.restarts import Trained, Training
from common.io.console import make_console
from common.io.usage import UsageError
from common.report.machine import git_commit, this_machine
from common.report.progress import ProgressView, progress_view
from common.report.result import Parity, RunResult, Step, measured
from common.runtime.faults import Fault, FaultError
from common.runtime.outcome import Outcome
from common.runtime.text import drop_tokens, write_text
from common.spec.run import RunConfig

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
SHOWN_LOSSES = 12

DESCRIPTION = (
    "Trains with one framework and saves checkpoints, which any framework can go on from, on any "
    "number of stages. "
    "Exit status: 0 all well; 1 the run failed; 2 wrong input; 130 interrupted."
)


def register(
    subcommands: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser("train", description=DESCRIPTION, usage="%(prog)s [options]")
    saving = parser.add_argument_group("checkpoints")
    saving.add_argument(
        "--save-every",
        metavar="N",
        type=positive,
        help="save after every N steps, and after the last",
    )
    saving.add_argument(
        "--save-dir", metavar="DIR", help="where checkpoints go (default: in the run's own folder)"
    )
    saving.add_argument(
        "--keep", metavar="K", type=positive, default=3, help="checkpoints to keep (default: 3)"
    )
    saving.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="go on from the newest checkpoint in --save-dir, or from this one",
    )
    saving.add_argument(
        "--weights",
        metavar="PATH",
        help="start at step 0 from a checkpoint's weights alone, with any training and dropout",
    )
    saving.add_argument(
        "--max-restarts",
        metavar="N",
        type=natural,
        default=0,
        help="start again from the last checkpoint up to N times, if the child dies (default: 0)",
    )
    add_timeout(parser)
    parser.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=seconds,
        default=600.0,
        help="end a child of which no device goes on and that computes nothing for so long, and "
        "say who waits for whom "
        "(default: 600)",
    )
    # For tests: a fault on purpose, such as kill@device=1,step=3,action=BW2 (docs/faults.md). Given
    # again: what the next worker process gets.
    parser.add_argument("--fault", type=_fault, action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="results",
        help="where the run's folder goes (default: results)",
    )
    add_run_options(parser)
    parser.set_defaults(run=reporting(lambda arguments: _train(arguments, implementations)))


def _fault(text: str) -> str:
    try:
        return str(Fault.parse(text))
    except FaultError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _train(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    console = make_console()
    directory = None if arguments.save_dir is None else Path(arguments.save_dir)
    if arguments.resume == "latest" and directory is None:
        raise UsageError("--resume latest: of which run? add --save-dir DIR")

    if len(arguments.fault) > arguments.max_restarts + 1:
        raise UsageError(
            f"--fault: {len(arguments.fault)} of them for {arguments.max_restarts + 1} children; "
            "expected --max-restarts "
            f"{len(arguments.fault) - 1}"
        )
    if arguments.resume is not None and arguments.weights is not None:
        raise UsageError(
            "--resume goes on with a training and --weights starts another; expected one of them"
        )

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with checkpoint.locked(directory) if directory else nullcontext():
        resume = _resume(arguments.resume or arguments.weights, directory, say)
        saved = None if resume is None else Saved(resume, checkpoint.read_manifest(resume))
        config = read_run(arguments, saved)
        if saved is not None:
            manifest = (
                saved.manifest if arguments.weights is None else saved.manifest.without_training()
            )
            check_resume(saved.folder, manifest, config)
        if arguments.fault and config.executor != "table":
            raise UsageError(
                f"--fault: executor = {config.executor} does not tell its actions; expected "
                "executor = table"
            )
        for text in arguments.fault:
            fault = Fault.parse(text)
            for what, number, count in (
                ("device", fault.device, config.stages),
                ("step", fault.step, config.train.steps),
            ):
                if number >= count:
                    raise UsageError(
                        f"--fault {text}: there is no {what} {number}; expected 0 to {count - 1}"
                    )
        corpus = load_text(config, saved, may_be_another=arguments.weights is not None)
        if directory is not None:
            _check_room(directory, None if arguments.weights else resume)
        implementation = implementations[config.framework]
        missing = why_missing(implementation, config.executor)
        if missing:
            raise UsageError(missing)
        folder = make_folder(Path(arguments.out), "train")
        name = run_name(config)
        say(f"results in {folder / name}/")
        directory = directory or folder / "checkpoints"
        training = Training(
            config=config,
            module=implementation.module,
            folder=folder / name,
            directory=directory,
            text=write_text(corpus, folder / name),
            resume=resume,
            weights_alone=arguments.weights is not None,
            save_every=arguments.save_every,
            keep=arguments.keep,
            max_restarts=arguments.max_restarts,
            timeout_seconds=arguments.timeout,
            hang_seconds=arguments.hang_timeout,
            faults=tuple(arguments.fault),
        )
        with (
            stop_on_signals() as stopped
        ):  # to the end, so that a second signal does not cut the result off
            with progress_view(console, 1) as view:
                trained = run_training(training, view, stopped)
            result = result_of(trained, training, arguments.command)
            result.write(folder / name / "result.json")
            drop_tensors(training)
            _show(result, trained, training, console)
    if trained.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if result.status == "ok" else EXIT_FAILED


def _resume(asked: str | None, directory: Path | None, say: Any) -> Path | None:
    """Return the checkpoint to continue from; name newer damaged ones and set them aside."""
    if asked is None:
        return None
    if asked != "latest":
        path = Path(asked)
        inside = checkpoint.checkpoints_in(path)
        if inside:
            raise UsageError(
                f"{path}: holds checkpoints; expected one of them, such as {inside[-1]}"
            )
        checkpoint.verify(path)
        return path
    if directory is None:
        return None
    found = checkpoint.newest(directory, say)
    if found is None:
        raise UsageError(f"--resume latest: no whole checkpoint in {directory}")
    for path in checkpoint.checkpoints_in(directory):
        if path.name > found.name:
            say(f"set aside as {checkpoint.set_aside(path).name}; going on from {found.name}")
    return found


def check_resume(resume: Path, saved: Manifest, config: RunConfig) -> None:
    """Raise UsageError if `config` cannot continue from the checkpoint."""
    different = checkpoint.differences(saved, config)
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        free = (
            "framework, stages, chunks, schedule, partition, micro_batches, recompute, "
            "device, threads"
        )
        if saved.train is None:
            raise UsageError(
                f"{resume}: {different[0]}{more}; what may change: {free}, dropout, and all of the "
                "training"
            )
        raise UsageError(
            f"--resume {resume}: {different[0]}{more}; what may change: {free}, and steps where "
            "the learning rate does not "
            f"depend on it; --weights starts another training from its weights"
        )
    if saved.steps_done >= config.train.steps:
        raise UsageError(
            f"--resume {resume}: all {saved.steps_done} of {config.train.steps} steps are done; "
            "use more --steps"
        )


def _check_room(directory: Path, resume: Path | None) -> None:
    """Refuse to write over another run's checkpoints. Raises UsageError."""
    existing = checkpoint.checkpoints_in(directory)
    if resume is None and existing:
        raise UsageError(
            f"--save-dir {directory}: holds {existing[-1].name} of an earlier run; "
            f"expected --resume latest, or another folder"
        )
    newer = [path for path in existing if resume is not None and path.name > resume.name]
    if newer:
        raise UsageError(
            f"--save-dir {directory}: holds {newer[-1].name}, newer than "
            f"{resume.name if resume else 'the start'}; "
            f"expected --resume latest, or another --save-dir"
        )


def run_training(
    training: Training, view: ProgressView, stopped: Callable[[], bool], name: str | None = None
) -> Trained:
    """Train and show the progress under this name (default: the run in words)."""
    name, end = name or describe(training.config), training.stop_at or training.config.train.steps
    view.start(name, end)
    trained = restarts.train(training, view.step, view.finish, stopped)
    losses, outcome = trained.steps, trained.outcome
    ended = "interrupted" if trained.interrupted else outcome.status
    reason = f": {outcome.reason}" if outcome.reason and not trained.interrupted else ""
    last = f", at step {losses[-1].step + 1} of {end}, loss {losses[-1].loss:.5f}" if losses else ""
    view.finish(f"{name}: {ended}{reason}{last}, {outcome.wall_seconds:.0f} s")
    return trained


def result_of(trained: Trained, training: Training, command: str) -> RunResult:
    """Return the run as a row of the benchmark; `steps` are those of all children together."""
    outcome = trained.outcome
    if trained.interrupted:
        outcome = Outcome("failed", "interrupted", outcome.log, (), outcome.wall_seconds)
    fields = measured(_timed(outcome), training.config, untimed_steps=2)
    steps = tuple(
        Step(
            step=record.step,
            loss=record.loss,
            gradient_norm=record.gradient_norm,
            seconds=record.seconds,
        )
        for record in trained.steps
    )
    return RunResult.model_validate(
        fields
        | {
            "steps": steps,
            "preset": "train",
            "config": training.config,
            "command": command,
            "machine": this_machine(),
            "git_commit": git_commit(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "log": None
            if outcome.log is None
            else str(outcome.log.relative_to(training.folder.parent)),
            "parity": Parity(reason="train compares with nothing"),
            "resumed_from": None if training.resume is None else str(training.resume),
            "restarts": tuple(trained.restarts),
        }
    )


def _timed(outcome: Outcome) -> Outcome:
    """Keep only the steps with events: those at the end of a long run."""
    parts = tuple(
        part.model_copy(update={"steps": [step for step in part.steps if step.events]})
        for part in outcome.parts
    )
    if not all(part.steps for part in parts):  # an executor that does not say what it did when
        return outcome
    return Outcome(outcome.status, outcome.reason, outcome.log, parts, outcome.wall_seconds)


def drop_tensors(training: Training) -> None:
    """Remove step 0's gradients, as large as the model, and the tokens, as large as the text."""
    for path in training.folder.glob("attempt-*/part-*.safetensors"):
        path.unlink()
    if training.text is not None:
        drop_tokens(training.text)


def _show(result: RunResult, trained: Trained, training: Training, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    every = max(1, -(-len(result.steps) // SHOWN_LOSSES))
    shown = [
        step for n, step in enumerate(result.steps) if n % every == 0 or n == len(result.steps) - 1
    ]
    for step in shown:
        say(
            f"  step {step.step + 1:>6}  loss {step.loss:.6f}  gradient norm "
            f"{step.gradient_norm:.4g}"
        )
    if result.held_out_loss is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        say(f"held-out loss {result.held_out_loss:.6f}{speed}")
    for line in trained.restarts:
        say(f"restarted: {line}")
    if result.status != "ok":
        say(f"{'interrupted' if trained.interrupted else 'failed: ' + result.reason}")
        if result.log is not None and not trained.interrupted:
            say(f"log: {training.folder.parent / result.log}")
    saved = checkpoint.checkpoints_in(training.directory)
    if saved:
        say(f"checkpoint: {saved[-1]}")
