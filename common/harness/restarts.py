"""Training that survives its worker: when one dies, the next continues from the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from common import checkpoint
from common.harness.launch import Interrupted, run_jobs_in_worker
from common.runtime.job import Job, JobText, Saving, StepRecord
from common.runtime.outcome import Outcome
from common.spec.run import RunConfig


@dataclass(frozen=True)
class Training:
    """What to train, from where, to which checkpoints. The caller holds the lock of `directory`."""

    config: RunConfig
    module: str
    """The implementation's, as `launch.IMPLEMENTATIONS` names it."""
    folder: Path
    """Each worker gets a folder in it: attempt-1, attempt-2, ..."""
    directory: Path
    text: JobText | None = None
    """Read once, for all workers; None: each worker's is read before it starts."""
    resume: Path | None = None
    weights_alone: bool = False
    """Whether only the weights of `resume` are used."""
    stop_at: int | None = None
    save_every: int | None = None
    keep: int = 3
    max_restarts: int = 0
    timeout_seconds: float = float("inf")
    """Of one worker."""
    hang_seconds: float = float("inf")
    """How long a worker may go without progress of any device."""
    faults: tuple[str, ...] = ()
    """To make on purpose (`common.runtime.faults`): the first by the first worker, and so on."""


@dataclass
class Trained:
    """The result of a training."""

    outcome: Outcome = field(
        default_factory=lambda: Outcome("failed", "not started", None, (), 0.0)
    )
    """Of the last worker; `wall_seconds` are of all workers."""
    steps: list[StepRecord] = field(default_factory=list)
    """The joined record of all workers: every step once, in order, without the events."""
    restarts: list[str] = field(default_factory=list)
    """One line for every worker that died and was followed by another."""
    interrupted: bool = False


def train(
    training: Training,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    report: Callable[[str], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Trained:
    """Run workers until one ends well, restarts are used up, or the next would fail alike."""
    trained, seconds, resume = Trained(), 0.0, training.resume
    for attempt in range(1, training.max_restarts + 2):
        folder = training.folder / f"attempt-{attempt}"
        fault = training.faults[attempt - 1] if attempt <= len(training.faults) else None
        try:
            trained.outcome = run_jobs_in_worker(
                training.module,
                [job_of(training, folder, resume, uuid.uuid4().hex, fault)],
                folder,
                training.timeout_seconds,
                on_step=lambda _, step, loss: on_step(step, loss),
                stopped=stopped,
                hang_seconds=training.hang_seconds,
            )[0]
        except Interrupted:
            trained.interrupted = True
        seconds += trained.outcome.wall_seconds
        trained.steps = joined(trained.steps, folder / "progress.jsonl")
        if trained.interrupted or trained.outcome.status == "ok":
            break
        cause = not_finite(folder)
        reason = cause or _without_module(trained.outcome.reason)
        trained.outcome = Outcome("failed", reason, trained.outcome.log, (), 0.0)
        # A restart takes up the same numbers, so what was not finite would not be finite again.
        if cause or attempt > training.max_restarts:
            break
        # Half a checkpoint of the dead worker would be in the next one's way.
        checkpoint.remove_leftovers(training.directory)
        resume = checkpoint.newest(training.directory, report) or training.resume
        start = "its beginning" if resume is None else resume.name
        who = f"worker process {attempt} of {training.config.framework}"
        trained.restarts.append(f"{who} died: {reason}; on from {start}")
        report(trained.restarts[-1])
        _make_room(training.directory, resume)
    outcome = trained.outcome
    trained.outcome = Outcome(outcome.status, outcome.reason, outcome.log, outcome.parts, seconds)
    return trained


def job_of(
    training: Training,
    folder: Path,
    resume: Path | None,
    token: str,
    fault: str | None,
    depot: str | None = None,
    board: str | None = None,
) -> Job:
    """Return what one worker process does of a training, into `folder`."""
    return Job(
        config=training.config,
        out=str(folder),
        board=board,
        text=training.text,
        resume=None if resume is None else str(resume.resolve()),
        weights_alone=training.weights_alone and resume == training.resume,
        stop_at=training.stop_at,
        saving=Saving(
            directory=str(training.directory.resolve()),
            every=training.save_every,
            keep=training.keep,
            token=token,
            depot=depot,
        ),
        fault=fault,
        must_be_finite=True,
    )


def joined(before: list[StepRecord], progress: Path) -> list[StepRecord]:
    """Join the record so far with the last worker's, so that no step is in it twice."""
    after = []
    if progress.exists():
        # What follows the last newline was cut off by the worker's death.
        for line in progress.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValidationError):
                after.append(StepRecord.model_validate(json.loads(line) | {"events": {}}))
    # A worker that died after step 7 had last saved step 5: the next one does 6 and 7 again, and
    # its records of them, which are the same to the bit, take the place of the first one's.
    return [record for record in before if not after or record.step < after[0].step] + after


def not_finite(folder: Path) -> str | None:
    """Return where a worker stopped at a non-finite number: the step and the first such tensor."""
    texts = (path.read_text(encoding="utf-8") for path in folder.glob("not-finite-*.json"))
    first = min(map(json.loads, texts), key=lambda note: note["order"], default=None)
    if first is None:
        return None
    tensor = f"the first tensor that is not finite: {first['tensor']}"
    return f"step {first['step'] + 1}: {first['what']}; {tensor}"


def _make_room(directory: Path, resume: Path | None) -> None:
    """Set aside damaged checkpoints newer than the one to continue from: their steps come again."""
    for path in checkpoint.checkpoints_in(directory):
        if resume is None or path.name > resume.name:
            checkpoint.set_aside(path)


def _without_module(reason: str) -> str:
    return re.sub(r"^(?:\w+\.)+(?=\w+: )", "", reason)
