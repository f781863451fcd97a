"""The parent side of a run: starts a worker, watches it, ends it, and says what came of each job.

    [1] write jobs.json; make each job's folder and the board that its devices are watched by
    [2] start `python -m <implementation> jobs.json`, in a session of its own, with the Python that
        has the framework (`common.harness.interpreters`)
    [3] until it ends: has the user stopped it? is the time over? is there progress? new losses?
    [4] end every process of its group, whatever happened
    [5] read what it left, and make one `Outcome` per job

A worker leads a session, and with it a process group, that holds all it starts (Paddle's ranks, for
one), so [4] reaches all of them. The worker has no channel back to the parent but files: whatever
kills it, what it has written stays, and a missing file is the finding. A worker that dies is an
`Outcome` that says so; only the user's own stop is an exception (`Interrupted`).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from common.harness.interpreters import interpreter, why_lacking, worker_command, worker_environment
from common.io.usage import UsageError
from common.runtime.job import Job, JobFile, Part
from common.runtime.loopback import why_no_loopback
from common.runtime.outcome import Outcome, of_first_line
from common.runtime.patience import Patience
from common.runtime.signals import heeding
from common.runtime.text import with_texts
from common.runtime.watch import Board
from common.spec.mesh import Mesh

ORACLE_MODULE = "common.runtime.oracle_worker"
ROUNDED_ORACLE_MODULE = "common.runtime.rounded_oracle"

ENDED_BY = "was ended by"
"""The words in which `common.runtime.ranks` reports a stage's process that got a signal."""

POLL_SECONDS = 0.1
HANG_SECONDS = 600.0
"""A worker that has computed nothing for this long hangs."""
START_SECONDS = 120.0
"""The least that a worker gets to import its framework and build the model before it can hang."""
TERMINATE_SECONDS = 3.0
"""How long a worker may take to end after SIGTERM, before SIGKILL."""
KILL_SECONDS = 60.0
"""How long to wait for processes after SIGKILL; the system may be slow to remove them."""


@dataclass(frozen=True)
class Implementation:
    """What the parent knows about one framework: names only."""

    module: str
    """Started as `python -m module JOBS.json`."""
    package: str
    """What the module imports. It is looked up here, never imported."""
    install: str
    process_executors: tuple[str, ...] = ()
    """Executors (`RunConfig.executor`) whose stages are processes and talk over loopback."""


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "torch": Implementation(
        "torch_impl", "torch", "make install, or pip install 'torch==2.13.*'", ("native",)
    ),
    "tensorflow": Implementation(
        "tf_impl",
        "tensorflow",
        "make install, or pip install 'tensorflow-cpu==2.21.*' 'keras==3.15.*'",
    ),
    "paddle": Implementation(
        "paddle_impl",
        "paddle",
        "make install, or pip install 'paddlepaddle==3.3.*'",
        process_executors=("table", "native"),
    ),
}


class Interrupted(Exception):
    """The user or the system asked to stop (Ctrl-C, SIGTERM, a closed terminal)."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT, SIGTERM and SIGHUP into a flag, and yield a function that reads it.

    So nothing is cut off half-way: the loops that run ask it between two steps. A signal that is
    ignored (nohup, `trap '' INT`) stays ignored.
    """
    stop = threading.Event()
    with heeding((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda number, frame: stop.set()):
        yield stop.is_set


def why_missing(
    implementation: Implementation, executor: str = "", python: str | None = None
) -> str | None:
    """Return why this implementation cannot start, and what to do; None if it can."""
    lacking = why_lacking(
        implementation.module, implementation.package, implementation.install, python
    )
    if lacking is not None or executor not in implementation.process_executors:
        return lacking
    return why_no_loopback()


def require(implementation: Implementation, executor: str = "", python: str | None = None) -> None:
    """Raise UsageError if this implementation cannot start."""
    if missing := why_missing(implementation, executor, python):
        raise UsageError(missing)


def run_jobs_in_worker(
    module: str,
    jobs: Sequence[Job],
    folder: Path,
    timeout_seconds: float = float("inf"),
    on_step: Callable[[int, int, float], None] = lambda job, step, loss: None,
    stopped: Callable[[], bool] = lambda: False,
    log: Path | None = None,
    hang_seconds: float | None = None,
) -> list[Outcome]:
    """Run `python -m module` over all jobs and return one outcome per job.

    Makes the jobs' folders; writes `jobs.json` and, unless `log` is another place, `worker.log`
    into `folder`. `on_step(job, step, loss)` is called as steps end.

    `timeout_seconds` is for the whole worker, however busy the machine. A hang is something else:
    no device makes progress, and either nothing is computed for `hang_seconds` (a deadlock), or one
    thread computes that long, and START_SECONDS at least (an endless loop). Before a device has
    begun, START_SECONDS is the least. Without `hang_seconds` only a worker that computes nothing
    hangs, after HANG_SECONDS.

    Raises Interrupted, with the worker ended, once `stopped()` is true; CorpusError and
    TokenizerError for jobs whose text cannot be read.
    """
    with contextlib.ExitStack() as texts:
        jobs = texts.enter_context(with_texts(jobs, folder))
        is_oracle = module in (ORACLE_MODULE, ROUNDED_ORACLE_MODULE)
        python = interpreter(module, None if is_oracle else jobs[0].config.python)
        # [1]
        folder.mkdir(parents=True, exist_ok=True)
        folders = [(job, out) for job in jobs for out in job.folders]
        for _, out in folders:
            out.mkdir(parents=True, exist_ok=True)
        job_file, log = folder / "jobs.json", log or folder / "worker.log"
        JobFile(jobs=tuple(jobs)).write(job_file)
        # Losses come from a file that grows; what each device does, from its board.
        progress = [_Progress(Path(job.out) / "progress.jsonl") for job in jobs]
        boards = [Board(out, job.config) for job, out in folders]
        began = time.monotonic()
        # Without a limit of the user's, computing for however long is no hang: a step may be slow.
        idle_seconds = HANG_SECONDS if hang_seconds is None else hang_seconds
        busy_seconds = float("inf") if hang_seconds is None else max(hang_seconds, START_SECONDS)
        ended_because = None
        with log.open("wb") as output:
            # [2] No stdin: a framework that asks something would wait for ever.
            worker = subprocess.Popen(
                worker_command(module, str(job_file), python=python),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(module, python),
                start_new_session=True,
            )
            # At first START_SECONDS at least: importing a framework makes no progress on the board.
            patience = Patience(worker.pid, max(idle_seconds, START_SECONDS), busy_seconds)
            try:
                while worker.poll() is None:  # [3]
                    if stopped():  # `finally` ends the worker first
                        raise Interrupted
                    if time.monotonic() - began > timeout_seconds:
                        ended_because = f"no result within {timeout_seconds:g} s (--timeout)"
                        break
                    if any(board.changed() for board in boards):
                        patience.renew(idle_seconds, busy_seconds)
                    if patience.is_over():
                        ended_because = (
                            f"no progress for {patience.idle_seconds:g} s "
                            f"(--hang-timeout): {_where(folders, boards)}"
                        )
                        break
                    for number, file in enumerate(progress):
                        for step, loss in file.new_steps():
                            on_step(number, step, loss)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        worker.wait(POLL_SECONDS)
            finally:
                # [4] After a good end too: nothing that the worker started may outlive it.
                end_group(worker)
                for board in boards:
                    board.remove()
        # Steps that ended since the last look.
        for number, file in enumerate(progress):
            for step, loss in file.new_steps():
                on_step(number, step, loss)
        # [5] A worker runs its jobs one after another and is timed as a whole: equal shares.
        seconds = time.monotonic() - began
        why = ended_because or _why_it_ended(worker.returncode, log)
        return [_outcome(job, log, why, seconds / len(jobs)) for job in jobs]


def _where(folders: Sequence[tuple[Job, Path]], boards: Sequence[Board]) -> str:
    """Return what the devices of the first unfinished job, or line of one, are doing."""
    for (job, out), board in zip(folders, boards, strict=True):
        if not any([*out.glob("part-*.json"), *out.glob("failed-*.txt")]):
            mesh, line = Mesh.of(job.config), job.folders.index(out)
            where = "" if len(job.folders) == 1 else f"{mesh.line_name(line)}: "
            return where + board.explain()
    return "all jobs have ended, but not the worker process"


def end_group(worker: subprocess.Popen[bytes]) -> None:
    """End every process of the worker's group: SIGTERM, a moment, SIGKILL. [4]"""
    for signal_number, seconds in (
        (signal.SIGTERM, TERMINATE_SECONDS),
        (signal.SIGKILL, KILL_SECONDS),
    ):
        if not _members(worker):
            break
        with contextlib.suppress(ProcessLookupError):  # the last one may end by itself just now
            os.killpg(worker.pid, signal_number)
        deadline = time.monotonic() + seconds
        while _members(worker) and time.monotonic() < deadline:
            time.sleep(0.02)
    worker.wait()


def _members(worker: subprocess.Popen[bytes]) -> list[int]:
    """Return the living processes of the worker's group. A zombie is dead, if not yet collected."""
    worker.poll()  # collects the worker, if it has ended
    living = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            if os.getpgid(process.pid) == worker.pid and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process.pid)
    return living


class _Progress:
    """Reads what was added to a progress.jsonl since the last look. [3]"""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def new_steps(self) -> list[tuple[int, float]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                whole_lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        # What follows the last newline is still being written: it is read again next time.
        self.position += len(whole_lines) + len(newline)
        steps = []
        for line in whole_lines.splitlines():
            # A line that a full disk has cut is no step.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                steps.append((int(record["step"]), float(record["loss"])))
        return steps


# ---------------------------------------------------------------------------------- the outcome [5]


def _outcome(job: Job, log: Path, why_worker_ended: str, seconds: float) -> Outcome:
    reason = ""
    failures = sorted(_files(job, "failed-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    parts: list[Part] = []
    if failures:
        # The first to fail is the cause. But a process that was killed writes nothing: another one
        # reports it, later, and by then its neighbours may have failed over the lost connection.
        reasons = [last_error(_text(path)) for path in failures]
        reason = next((line for line in reasons if ENDED_BY in line), reasons[0])
    else:
        try:
            parts = [Part.model_validate_json(_text(path)) for path in _files(job, "part-*.json")]
        except ValidationError as error:
            reason = f"a part of the result cannot be read: {error}".splitlines()[0]
        parts.sort(key=lambda part: part.devices)
        # Every device must be in some part: a rank that is gone without a word leaves a gap.
        found = collections.Counter(device for part in parts for device in part.devices)
        lacking = [d for d in range(job.config.stages) if found[d] < len(job.folders)]
        if lacking and not reason:
            reason = why_worker_ended
            if parts:
                reason += f"; no result from device {', '.join(map(str, lacking))}"
    if reason:
        return Outcome("failed", reason, log, (), seconds)
    return Outcome("ok", "", log, of_first_line(parts, job.config.stages), seconds)


def _files(job: Job, pattern: str) -> list[Path]:
    """Return the files of all lines."""
    return [path for out in job.folders for path in out.glob(pattern)]


def _why_it_ended(return_code: int, log: Path) -> str:
    # 128 + n is a shell's way to say signal n: 137 for SIGKILL, as -9 from the system itself.
    killed = -return_code if return_code < 0 else return_code - 128
    if killed == signal.SIGKILL:
        return "killed by SIGKILL: most likely out of memory"
    error = last_error(_text(log))
    if return_code < 0:
        return f"crashed with {signal.Signals(killed).name}" + (f": {error}" if error else "")
    return error or f"ended with status {return_code} and without a result"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


_ERROR_LINE = re.compile(
    r"(?:[\w.]*(?:Error|Exception|Failure|Interrupt|Exit)\b|Fatal Python error).*"
)


def last_error(text: str) -> str:
    """Return the last line of a log that names an error, `SomeError: ...`, or the very last one."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR_LINE.match(line)]
    return (named or lines or [""])[-1].strip()
