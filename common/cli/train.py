"""The subcommand train: one run of one framework, with checkpoints, new or continued."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from common import checkpoint
from common.checkpoint import Manifest
from common.cli.numbers import add_timeout, natural, positive, seconds
from common.cli.options import PLACEMENT, add_run_options, read_run
from common.cli.saved import Saved, load_text
from common.harness import restarts
from common.harness.bench import describe, make_folder, run_name
from common.harness.launch import IMPLEMENTATIONS, Implementation, require, stop_on_signals
from common.harness.restarts import Trained, Training
from common.io.console import make_console, say
from common.io.usage import UsageError
from common.report.machine import git_commit, this_machine
from common.report.progress import PlainProgress, progress_view
from common.report.result import Parity, RunResult, measured
from common.runtime.faults import PHASES, Fault
from common.runtime.outcome import Outcome
from common.runtime.text import drop_tokens, write_text
from common.spec.data import Corpus
from common.spec.partition import schedule_of
from common.spec.run import RunConfig

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
SHOWN_LOSSES = 12
FREE = (
    *PLACEMENT[:-2],
    "replicas",
    "compress",
    "tensor_parallel",
    "vocab_parallel",
    "micro_batches",
    "recompute",
    *PLACEMENT[-2:],
)
"""What may change where a training goes on."""

DESCRIPTION = (
    "Trains with one framework and saves checkpoints, which any framework can go on from, on any "
    "number of stages. Exit status: 0 all well; 1 the run failed; 2 wrong input; 130 interrupted."
)


def register(
    subcommands: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS
) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser("train", description=DESCRIPTION)
    add_options(parser)
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=natural,
        default=0,
        help="start a worker process that dies again, from the last checkpoint, up to N times "
        "(default: 0)",
    )
    add_timeout(parser)
    parser.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=seconds,
        default=600.0,
        help="end a worker process that computes nothing and none of whose devices goes on for so "
        "long, and say who waits for whom (default: 600)",
    )
    parser.set_defaults(run=lambda arguments: _train(arguments, implementations))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a training takes, whoever starts its processes."""
    saving: Any = parser.add_argument_group("checkpoints")
    for option, metavar, kind, default, text in (
        ("--save-every", "N", positive, None, "save every N steps, and after the last"),
        ("--save-dir", "DIR", None, None, "where they go (default: in the run's own folder)"),
        ("--keep", "K", positive, 3, "how many to keep (default: 3)"),
        (
            *("--resume", "latest|PATH", None, None),
            "go on from the newest checkpoint in --save-dir, or from this one",
        ),
        (
            *("--weights", "PATH", None, None),
            "start at step 0 from a checkpoint's weights alone, with any training and dropout",
        ),
    ):
        saving.add_argument(option, metavar=metavar, type=kind, default=default, help=text)
    # For tests: a fault on purpose, such as kill@device=1,step=3,action=BW2 (docs/faults.md). Given
    # again: what the next worker process gets.
    parser.add_argument("--fault", type=_fault, action="append", default=[], help=argparse.SUPPRESS)
    where = "where the run's folder goes (default: results)"
    parser.add_argument("--out", metavar="FOLDER", default="results", help=where)
    add_run_options(parser)


def _fault(text: str) -> str:
    try:
        return str(Fault.parse(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _train(arguments: argparse.Namespace, implementations: Mapping[str, Implementation]) -> int:
    console = make_console()
    # Locked before anything is read: two runs must not choose the same checkpoint to go on from.
    directory = save_directory(arguments)
    with checkpoint.locked(directory) if directory else nullcontext():
        resume = choose(arguments.resume or arguments.weights, directory, console)
        config, corpus = read_training(arguments, resume, arguments.max_restarts + 1)
        if resume is not None and arguments.weights is None:
            check_steps_of_faults(arguments.fault, checkpoint.read_manifest(resume).steps_done)
        if directory is not None:
            check_room(directory, None if arguments.weights else resume)
        implementation = implementations[config.framework]
        require(implementation, config.executor, config.python)
        folder = make_folder(Path(arguments.out), "train")
        name = run_name(config)
        say(console, f"results in {folder / name}/")
        goes_on = arguments.max_restarts > 0 or (resume is not None and not arguments.weights)
        say_what_is_forgotten(config, goes_on, console)
        training = Training(
            config=config,
            module=implementation.module,
            folder=folder / name,
            directory=directory or folder / "checkpoints",
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
        # To the end, so that a second signal does not cut the result off.
        with stop_on_signals() as stopped:
            with progress_view(console, 1) as view:
                trained = run_training(training, view, stopped)
            result = result_of(trained, training, arguments.command)
            result.write(folder / name / "result.json")
            drop_tensors(training)
            show(result, trained, training, console)
    if trained.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if result.status == "ok" else EXIT_FAILED


def save_directory(arguments: argparse.Namespace) -> Path | None:
    """Return the folder of --save-dir, if it is given. Raises UsageError if --resume lacks it."""
    directory = None if arguments.save_dir is None else Path(arguments.save_dir)
    if arguments.resume == "latest" and directory is None:
        raise UsageError("--resume latest: of which run? add --save-dir DIR")
    if arguments.resume is not None and arguments.weights is not None:
        raise UsageError(
            "--resume goes on with a training and --weights starts another; expected one of them"
        )
    return directory


def read_training(
    arguments: argparse.Namespace, resume: Path | None, attempts: int
) -> tuple[RunConfig, Corpus]:
    """Return what to train, and its text, from the command line and the checkpoint to start from.

    `attempts` is the number of worker processes that may follow one another. Raises UsageError.
    """
    saved = None if resume is None else Saved(resume, checkpoint.read_manifest(resume))
    config = read_run(arguments, saved)
    _check_faults(arguments.fault, attempts, config, arguments.save_every)
    if saved is not None:
        manifest = saved.manifest
        manifest = manifest.without_training() if arguments.weights else manifest
        check_resume(saved.folder, manifest, config)
    return config, load_text(config, saved, may_be_another=arguments.weights is not None)


def _check_faults(
    faults: Sequence[str], attempts: int, config: RunConfig, save_every: int | None
) -> None:
    """Refuse faults that would never happen. Raises UsageError."""
    if len(faults) > attempts:
        raise UsageError(
            f"--fault: {len(faults)} of them for {attempts} worker process{'es' * (attempts > 1)}; "
            f"expected --max-restarts {len(faults) - 1}"
        )
    if faults and config.executor != "table":
        why = "does not tell its actions; expected executor = table"
        raise UsageError(f"--fault: executor = {config.executor} {why}")
    for fault in map(Fault.parse, faults):
        for what, count in {"device": config.stages, "step": config.train.steps}.items():
            number = getattr(fault, what)
            if number >= count:
                why = f"there is no {what} {number}; expected 0 to {count - 1}"
                raise UsageError(f"--fault {fault}: {why}")
        done, action = fault.step + 1, fault.action
        if action == "save" and done < config.train.steps and done % (save_every or done + 1):
            why = f"step {fault.step} does not save; expected {config.train.steps - 1}, the last"
            raise UsageError(f"--fault {fault}: {why}, or one that --save-every names")
        actions = [str(each) for each in schedule_of(config).devices[fault.device]]
        if action not in (None, *PHASES, *actions):
            why = f"device {fault.device} has no {action} in schedule {config.schedule}"
            raise UsageError(f"--fault {fault}: {why}; expected one of {', '.join(actions)}")


def check_steps_of_faults(faults: Sequence[str], first_step: int) -> None:
    """Refuse faults in steps that are done. Raises UsageError."""
    for fault in map(Fault.parse, faults):
        if fault.step < first_step:
            why = f"the checkpoint has done step {fault.step}; expected {first_step} or more"
            raise UsageError(f"--fault {fault}: {why}")


def choose(asked: str | None, directory: Path | None, console: Console) -> Path | None:
    """Return the checkpoint to continue from; name newer damaged ones and set them aside."""
    if asked is not None and asked != "latest":
        path = Path(asked)
        if inside := checkpoint.checkpoints_in(path):
            what = f"expected one of them, such as {inside[-1]}"
            raise UsageError(f"{path}: holds checkpoints; {what}")
        checkpoint.verify(path)
        return path
    if asked is None or directory is None:
        return None
    found = checkpoint.newest(directory, lambda line: say(console, line))
    if found is None:
        raise UsageError(f"--resume latest: no whole checkpoint in {directory}")
    for path in checkpoint.checkpoints_in(directory):
        if path.name > found.name:
            aside = checkpoint.set_aside(path).name
            say(console, f"set aside as {aside}; going on from {found.name}")
    return found


def check_resume(resume: Path, saved: Manifest, config: RunConfig) -> None:
    """Raise UsageError if `config` cannot continue from the checkpoint."""
    if different := checkpoint.differences(saved, config):
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        free = f"{different[0]}{more}; what may change: {', '.join(FREE)}"
        if saved.train is None:
            raise UsageError(f"{resume}: {free}, dropout, and all of the training")
        raise UsageError(
            f"--resume {resume}: {free}, and steps where the learning rate does not depend on it; "
            "--weights starts another training from its weights"
        )
    if saved.steps_done >= config.train.steps:
        done = f"all {saved.steps_done} of {config.train.steps} steps are done"
        raise UsageError(f"--resume {resume}: {done}; use more --steps")


def say_what_is_forgotten(config: RunConfig, goes_on: bool, console: Console) -> None:
    """Say what a training that goes on from a checkpoint does not find in it."""
    if goes_on and config.compression.remembers:
        what = "what a replica has not sent yet is not in a checkpoint"
        say(console, f"compress = {config.compress}: {what}, so a training that goes on drops it")


def check_room(directory: Path, resume: Path | None) -> None:
    """Refuse to write over another run's checkpoints. Raises UsageError."""
    existing = checkpoint.checkpoints_in(directory)
    if existing and resume is None:
        raise UsageError(
            f"--save-dir {directory}: holds {existing[-1].name} of an earlier run; expected "
            "--resume latest, or another folder"
        )
    if existing and resume is not None and existing[-1].name > resume.name:
        raise UsageError(
            f"--save-dir {directory}: holds {existing[-1].name}, newer than {resume.name}; "
            "expected --resume latest, or another --save-dir"
        )


def run_training(
    training: Training, view: PlainProgress, stopped: Callable[[], bool], name: str | None = None
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
    """Return the run as a row of the benchmark; its steps are those of all worker processes."""
    outcome = trained.outcome
    if trained.interrupted:
        outcome = Outcome("failed", "interrupted", outcome.log, (), outcome.wall_seconds)
    log = outcome.log
    names = ("step", "loss", "gradient_norm", "seconds")
    fields = measured(_timed(outcome), training.config, untimed_steps=2) | {
        "steps": [{name: getattr(step, name) for name in names} for step in trained.steps],
        "preset": "train",
        "config": training.config,
        "command": command,
        "machine": this_machine(),
        "git_commit": git_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "log": None if log is None else str(log.relative_to(training.folder.parent)),
        "parity": Parity(reason="train compares with nothing"),
        "resumed_from": None if training.resume is None else str(training.resume),
        "restarts": tuple(trained.restarts),
    }
    return RunResult.model_validate(fields)


def _timed(outcome: Outcome) -> Outcome:
    """Keep only the steps with events: those at the end of a long run."""
    parts = tuple(
        part.model_copy(update={"steps": [step for step in part.steps if step.events]})
        for part in outcome.parts
    )
    # Without any, the executor does not say what it did when.
    return replace(outcome, parts=parts) if all(part.steps for part in parts) else outcome


def drop_tensors(training: Training) -> None:
    """Remove step 0's gradients, as large as the model, and the tokens, as large as the text."""
    for path in training.folder.glob("attempt-*/**/part-*.safetensors"):
        path.unlink()
    if training.text is not None:
        drop_tokens(training.text)


def show(result: RunResult, trained: Trained, training: Training, console: Console) -> None:
    every = max(1, -(-len(result.steps) // SHOWN_LOSSES))
    lines = [
        f"  step {s.step + 1:>6}  loss {s.loss:.6f}  gradient norm {s.gradient_norm:.4g}"
        for n, s in enumerate(result.steps)
        if n % every == 0 or n == len(result.steps) - 1
    ]
    if result.held_out_loss is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        lines.append(f"held-out loss {result.held_out_loss:.6f}{speed}")
    lines += [f"restarted: {line}" for line in trained.restarts]
    if trained.interrupted:
        lines.append("interrupted")
    elif result.status != "ok":
        lines.append(f"failed: {result.reason}")
        if result.log is not None:
            lines.append(f"log: {training.folder.parent / result.log}")
    if saved := checkpoint.checkpoints_in(training.directory):
        lines.append(f"checkpoint: {saved[-1]}")
    for line in lines:
        say(console, line)
