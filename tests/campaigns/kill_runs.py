"""`python -m tests.campaigns.kill_runs --kills 300`: kills training runs at random and checks that
nothing is lost.

A trial trains one small model with `triptych train --save-every 5 --max-restarts N`. Again and
again a random process of it (the parent, the worker, with Paddle also a stage's process) gets a
random signal (SIGKILL, SIGTERM, SIGINT) at a random moment: while it starts, between steps, or
while it saves. A dead worker is started again by the parent; a dead parent by hand, with `--resume
latest`. After every kill: a dead parent leaves no process behind, every checkpoint can be read. At
the end of a trial: every loss that any worker ever reported, the held-out loss, the weights and the
moments are, to the bit, those of a run that nothing disturbed; nothing half-written is left, and no
shared memory.

Every kill is a line of OUT/kills.jsonl as it happens; at the end statistics go to OUT/kills.json
and OUT/kills.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from common import checkpoint
from common.checkpoint import CheckpointError
from common.report.grid import Grid
from common.report.result import RunResult
from common.spec.run import FRAMEWORKS
from tests.checkpoints import same, tensors_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
COMMAND = (
    "train --stages 2 --schedule 1f1b --num-layers 2 --d-model 16 --d-ff 32 --num-heads 2 "
    "--context-length 16 --batch-size 8 --micro-batches 4 --dropout 0.1 --dtype float64 --threads "
    f"1 --steps {STEPS} --save-every 5"
)
MARK = "TRIPTYCH_KILL_RUNS"
"""An environment variable by which all processes of a trial are found again, whoever their parent
is now.
"""

KILLS_PER_TRIAL = 10
PATIENCE_SECONDS = 180.0
"""For a run to get on; the machine may be busy."""
PARENT_ENDS_SECONDS = 20.0
FAMILY_ENDS_SECONDS = 15.0
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Lost(Exception):
    """A kill that the run did not survive: says what is lost."""


def command_of(framework: str, saves: Path, out: Path) -> list[str]:
    places = ["--framework", framework, "--save-dir", str(saves), "--out", str(out)]
    return [sys.executable, "-m", "common.cli", *COMMAND.split(), *places]


Note = Callable[[dict[str, Any]], None]


class Trial:
    """One training, disturbed until it has had its kills, and then left to its end."""

    def __init__(
        self, framework: str, number: int, seed: int, folder: Path, reference: Reference, note: Note
    ) -> None:
        self.framework, self.number, self.note, self.reference = framework, number, note, reference
        self.random = random.Random(f"{seed} {framework} {number}")
        self.folder = folder / f"{framework}-{number}"
        self.saves, self.out = self.folder / "checkpoints", self.folder / "out"
        self.folder.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.parent: subprocess.Popen[bytes] | None = None
        self.kills: list[dict[str, Any]] = []

    def run(self, kills: int) -> None:
        try:
            self.start()
            while len(self.kills) < kills and self.disturb():
                pass
            self.finish()
            lost = ""
        except Lost as error:
            lost = str(error)
        finally:
            self.end_all()
        for n, kill in enumerate(self.kills):
            # What a trial has lost, its last kill has lost: the earlier ones had been checked and
            # gone on from.
            self.note(kill | {"survived": not (lost and n == len(self.kills) - 1), "lost": lost})
        if lost and not self.kills:
            none = {"framework": self.framework, "trial": self.number, "victim": "none"}
            self.note(none | {"survived": False, "lost": lost})

    # ------------------------------------------------------------------------------------ processes

    def start(self) -> None:
        resume = ["--resume", "latest"] if checkpoint.checkpoints_in(self.saves) else []
        command = command_of(self.framework, self.saves, self.out)
        with (self.folder / "parent.log").open("ab") as log:
            self.parent = subprocess.Popen(
                [*command, "--max-restarts", "99", *resume],
                cwd=ROOT,
                env=os.environ | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def family(self) -> list[psutil.Process]:
        """Return all living processes of this trial."""
        word = f"{MARK}={self.mark}".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if (
                    word in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def end_all(self) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.parent is not None:
            self.parent.wait()

    def victims(self) -> dict[str, list[int]]:
        """Process numbers by role, as of now."""
        assert self.parent is not None
        roles: dict[str, list[int]] = {"parent": [self.parent.pid]}
        with contextlib.suppress(psutil.Error):
            for worker in psutil.Process(self.parent.pid).children():
                if "_impl" not in " ".join(worker.cmdline()):
                    continue
                for role, those in (("worker", [worker]), ("rank", worker.children())):
                    living = [p.pid for p in those if p.status() != psutil.STATUS_ZOMBIE]
                    roles[role] = roles.get(role, []) + living
        return roles

    # ------------------------------------------------------------------------------------- one kill

    def disturb(self) -> bool:
        """One kill. False if the run was over before."""
        moment = self.random.choices(["start", "step", "save"], [2, 4, 3])[0]
        role = self.random.choice(
            ["parent", "worker", "rank"] if self.framework == "paddle" else ["parent", "worker"]
        )
        number = self.random.choice(SIGNALS)
        if not self.wait_for(moment, role):
            return False
        pids = self.victims().get(role, [])
        if not pids or self.ended():
            return not self.ended()
        step = self.steps_seen()
        kill = {"framework": self.framework, "trial": self.number, "kill": len(self.kills)}
        kill |= {"victim": role, "signal": signal.Signals(number).name, "moment": moment}
        kill |= {"steps_seen": step, "saving": any(self.saves.glob(".step-*.partial"))}
        self.kills.append(kill)
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(pids), number)
        if role == "parent":
            self.expect_parent_ends(number)
        kill["seconds"] = round(time.monotonic() - began, 2)
        return True

    def wait_for(self, moment: str, role: str) -> bool:
        """Until there is such a process and the moment has come. False if the run ended first."""
        if moment == "start":
            self.until(lambda: bool(self.victims().get(role)), f"no {role} started")
            time.sleep(self.random.uniform(0, 5))
            return not self.ended()
        began, wanted = self.position(), self.random.randint(1, 25)
        self.until(lambda: self.position() >= began + wanted, "no progress", poll_seconds=0.01)
        if moment == "save" and not self.ended():
            self.until(
                lambda: any(self.saves.glob(".step-*.partial")), "no save", poll_seconds=0.0005
            )
            time.sleep(self.random.uniform(0, 0.02))
        elif not self.ended():
            time.sleep(self.random.uniform(0, 0.05))
        return not self.ended()

    def until(self, reached: Callable[[], bool], what: str, poll_seconds: float = 0.05) -> None:
        """Until `reached()` or the run has ended. Raises Lost if neither comes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached() and not self.ended():
            if time.monotonic() > deadline:
                raise Lost(f"{what} within {PATIENCE_SECONDS:g} s")
            time.sleep(poll_seconds)

    def ended(self) -> bool:
        assert self.parent is not None
        return self.parent.poll() is not None

    def progress_files(self) -> list[Path]:
        return list(self.out.glob("*/*/attempt-*/progress.jsonl"))

    def position(self) -> int:
        """Lines of progress over all workers: grows with every step, also with those that are done
        again.
        """
        total = 0
        for path in self.progress_files():
            with contextlib.suppress(OSError):
                total += path.read_bytes().count(b"\n")
        return total

    def steps_seen(self) -> int:
        return max((record["step"] + 1 for record in self.records()), default=0)

    def records(self) -> Iterator[dict[str, Any]]:
        for path in self.progress_files():
            for line in path.read_bytes().split(b"\n")[:-1]:
                yield json.loads(line)

    def expect_parent_ends(self, number: int) -> None:
        assert self.parent is not None
        try:
            status = self.parent.wait(PARENT_ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            raise Lost(
                f"the parent lives {PARENT_ENDS_SECONDS:g} s after {signal.Signals(number).name}"
            ) from None
        deadline = time.monotonic() + FAMILY_ENDS_SECONDS
        while self.family():
            if time.monotonic() > deadline:
                living = [process.cmdline() for process in self.family()]
                raise Lost(f"processes outlive the parent: {living}")
            time.sleep(0.05)
        self.check_checkpoints()
        if status != 0:
            # Before it listens a signal ends it.
            expected = (-number,) if number == signal.SIGKILL else (130, -number)
            if status not in expected:
                raise Lost(f"the parent ended with status {status}; expected {expected}")
            self.start()

    def check_checkpoints(self) -> None:
        for path in checkpoint.checkpoints_in(self.saves):
            try:
                checkpoint.verify(path)
            except CheckpointError as error:
                raise Lost(f"a checkpoint is damaged: {error}") from None

    # -------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        self.until(lambda: False, "the run did not end")
        assert self.parent is not None
        if self.parent.returncode != 0:
            text = (self.folder / "parent.log").read_text(errors="replace")
            raise Lost(f"the run ended with status {self.parent.returncode}: {text[-600:]}")
        if self.family():
            raise Lost("processes outlive a run that ended well")
        self.check_checkpoints()
        names = {path.name for path in self.saves.iterdir()}
        extra = {name for name in names if not name.startswith("step-") and name != ".lock"}
        if extra:
            raise Lost(f"left behind in the folder of checkpoints: {sorted(extra)}")
        for record in self.records():
            undisturbed = self.reference.losses[record["step"]]
            if record["loss"] != undisturbed:
                seen = f"step {record['step']}: loss {record['loss']!r}"
                raise Lost(f"{seen}, undisturbed {undisturbed!r}")
        results = [RunResult.read(path) for path in self.out.glob("*/*/result.json")]
        losses, undisturbed = [r.held_out_loss for r in results], self.reference.held_out_loss
        if undisturbed not in losses:
            raise Lost(f"held-out loss {losses}, undisturbed {undisturbed}")
        last = tensors_of(checkpoint.checkpoints_in(self.saves)[-1])
        if not same(last, self.reference.last):
            raise Lost("weights or moments differ from those of the undisturbed run")


class Reference:
    """The run that nothing disturbs."""

    def __init__(self, framework: str, folder: Path) -> None:
        out = folder / f"{framework}-undisturbed"
        saves = out / "checkpoints"
        command = command_of(framework, saves, out)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        result = RunResult.read(next(out.glob("*/*/result.json")))
        self.losses = [step.loss for step in result.steps]
        self.held_out_loss = result.held_out_loss
        self.last = tensors_of(checkpoint.checkpoints_in(saves)[-1])


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*")}


def _statistics(
    kills: Sequence[dict[str, Any]], trials: int, shared_memory_left: list[str]
) -> dict[str, Any]:
    """Survivors by framework, victim and signal."""
    counts: Counter[tuple[str, str, str]] = Counter()
    survived: Counter[tuple[str, str, str]] = Counter()
    for kill in kills:
        key = (kill["framework"], kill["victim"], kill.get("signal", "none"))
        counts[key] += 1
        survived[key] += kill["survived"]
    rows = [
        {"framework": f, "victim": v, "signal": s, "kills": n, "survived": survived[f, v, s]}
        for (f, v, s), n in sorted(counts.items())
    ]
    return {
        "kills": len(kills),
        "survived": sum(kill["survived"] for kill in kills),
        "lost": [kill["lost"] for kill in kills if not kill["survived"]],
        "rows": rows,
        "moments": dict(Counter(kill.get("moment", "none") for kill in kills)),
        "while_saving": sum(bool(kill.get("saving")) for kill in kills),
        "shared_memory_left": shared_memory_left,
        "steps": STEPS,
        "trials": trials,
    }


def markdown(found: dict[str, Any]) -> str:
    titles = ("framework", "victim", "signal", "kills", "survived")
    cells = [[str(row[title]) for title in titles] for row in found["rows"]]
    cells.append(["all", "", "", str(found["kills"]), str(found["survived"])])
    return Grid(titles, cells, titles[:3]).markdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.kill_runs", description=__doc__
    )
    parser.add_argument("--kills", type=int, default=300, help="how many in all (default: 300)")
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--at-once", type=int, default=2, help="trials that run side by side (default: 2)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder for logs, runs and statistics"
    )
    arguments = parser.parse_args(argv)
    # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    frameworks = arguments.frameworks.split(",")
    arguments.out.mkdir(parents=True)
    before, lock, kills = shared_memory(), threading.Lock(), []

    def note(kill: dict[str, Any]) -> None:
        with lock, (arguments.out / "kills.jsonl").open("a") as file:
            kills.append(kill)
            file.write(json.dumps(kill) + "\n")

    references = {framework: Reference(framework, arguments.out) for framework in frameworks}
    trials = []
    for n in range(-(-arguments.kills // KILLS_PER_TRIAL)):
        framework = frameworks[n % len(frameworks)]
        trials.append(
            Trial(framework, n, arguments.seed, arguments.out, references[framework], note)
        )

    def write_statistics() -> dict[str, Any]:
        with lock:
            found = _statistics(kills, len(trials), sorted(shared_memory() - before))
        (arguments.out / "kills.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.out / "kills.md").write_text(markdown(found))
        return found

    with ThreadPoolExecutor(arguments.at_once) as pool:
        for done in [pool.submit(trial.run, KILLS_PER_TRIAL) for trial in trials]:
            done.result()
            write_statistics()
    found = write_statistics()
    print(markdown(found))
    print("\n".join(found["lost"]))
    return 0 if found["survived"] == found["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
