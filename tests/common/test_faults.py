"""Faults on purpose, in every kind of action, in every framework: one clear message, nothing lost,
nothing left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import checkpoint
from common.cli import train
from common.harness import launch
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.report.result import RunResult
from common.runtime.faults import Fault, FaultError
from common.runtime.parent import PARENT
from common.runtime.watch import Board, Place, Watch, explain, who_waits
from common.schedule.action import parse_action
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec
from tests.checkpoints import same, tensors_of
from tests.program import SMALL, assert_refused, call, with_defaults
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FAULTY = {name: Implementation("tests.fakes.faulty", "numpy", "") for name in FRAMEWORKS}
PROGRESS = "out/*/*/attempt-1/progress.jsonl"
TRAINING = {
    **{**SMALL, "--num-layers": 2, "--num-heads": 2, "--micro-batches": 4, "--steps": 8},
    **{"--dropout": 0.1, "--threads": 1, "--stages": 2, "--schedule": "1f1b"},
}
CONFIG = RunConfig(stages=2, schedule="1f1b", train=TrainSpec(batch_size=4, micro_batches=4))


def run(tmp_path: Path, *argv: Any, implementations: Any = FAULTY) -> int:
    places = {"--out": tmp_path / "out", "--save-dir": tmp_path / "saves"}
    return call(["train", *with_defaults(TRAINING | places, argv)], implementations, train)


def result(tmp_path: Path) -> RunResult:
    return RunResult.read(next((tmp_path / "out").glob("*/*/result.json")))


def bits(tmp_path: Path) -> dict[str, Any]:
    """Weights and moments of the newest checkpoint; the folder holds nothing but checkpoints."""
    saves = tmp_path / "saves"
    found = checkpoint.checkpoints_in(saves)
    assert {path.name for path in saves.iterdir()} == {path.name for path in found} | {".lock"}
    for path in found:
        checkpoint.verify(path)
    return tensors_of(found[-1])


def shared_memory() -> set[Path]:
    folder = Path("/dev/shm")
    return set(folder.iterdir()) if folder.is_dir() else set()


def given(*faults: str) -> list[str]:
    return [word for fault in faults for word in ("--fault", fault)]


# ------------------------------------------------------------------------------ the oracle's worker


def test_every_fault_in_every_kind_of_action_loses_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == 0
    faults = {
        "exception@step=1,action=F2": "InjectedFault: exception@device=0,step=1,action=F2; on from "
        "its beginning",
        "kill@device=1,step=3,action=BW2": "killed by SIGKILL: most likely out of memory; on from "
        "step-00000002",
        "hang@device=1,step=2,action=BW1": "no progress for 2 s (--hang-timeout): device 1 hangs "
        "in BW1, step 2",
        "oom@step=4,action=F1": "MemoryError; on from step-00000004",
        "exception@step=5,action=optimizer": "action=optimizer; on from step-00000004",
        "disk-full@step=5": "cannot save step 6 in",
        "kill@step=5,action=save": "killed by SIGKILL: most likely out of memory; on from "
        "step-00000004",
    }
    options = ["--save-every", 2, "--max-restarts", len(faults), "--hang-timeout", 2]
    assert run(tmp_path / "hurt", *options, *given(*faults)) == 0
    hurt, whole = result(tmp_path / "hurt"), result(tmp_path / "whole")
    assert len(hurt.restarts) == len(faults)
    for line, message in zip(hurt.restarts, faults.values(), strict=True):
        assert message in line, line
    assert [step.loss for step in hurt.steps] == [step.loss for step in whole.steps]
    assert hurt.held_out_loss == whole.held_out_loss
    assert same(bits(tmp_path / "hurt"), bits(tmp_path / "whole"))


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--save-every", 2, *given("disk-full@step=5")) == 1
    assert bits(tmp_path)
    assert checkpoint.newest(tmp_path / "saves") == tmp_path / "saves" / "step-00000004"
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    (line,) = failed
    assert "cannot save step 6 in" in line and "File too large" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_given_twice_while_a_save_hangs(tmp_path: Path, number: int) -> None:
    code = "import sys, pathlib; import tests.common.test_faults as t; "
    code += "sys.exit(t.run(pathlib.Path(sys.argv[1]), *sys.argv[2:]))"
    argv = [str(tmp_path), "--save-every", "2", *given("hang@step=3,action=save")]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_until(
        lambda: [b.count(b"\n") for b in map(Path.read_bytes, tmp_path.glob(PROGRESS))] == [4],
        parent,
    )
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    parent.send_signal(number)
    time.sleep(0.01)
    parent.send_signal(number)
    output, _ = parent.communicate()
    assert parent.returncode == 130, output
    assert "interrupted" in output and "Traceback" not in output
    assert not [p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert bits(tmp_path)
    assert checkpoint.newest(tmp_path / "saves") == tmp_path / "saves" / "step-00000002"


def test_a_second_run_in_the_same_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.locked(tmp_path / "saves"):
        assert_refused(run(tmp_path), f"in use by process {os.getpid()} on ", capsys)


def test_what_a_dead_worker_left_half_written_is_gone_when_the_run_ends(tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    with checkpoint.locked(saves):
        (saves / f".step-00000002.{'a1' * 16}.partial").mkdir()
        (saves / ".step-00000001.deleted").mkdir()
        (saves / "mine").mkdir()
    assert {path.name for path in saves.iterdir()} == {".lock", "mine"}


def test_a_worker_whose_parent_ended_before_it_began_ends_too() -> None:
    code = "from common.runtime.parent import end_with_parent; end_with_parent(); print('alive')"
    for parent, ended in (("1", (143, "")), (str(os.getpid()), (0, "alive\n"))):
        command = [sys.executable, "-c", code]
        environment = os.environ | {PARENT: parent}
        worker = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert (worker.returncode, worker.stdout) == ended


# ----------------------------------------------------------------------------------- the frameworks

REAL = {
    "torch": {
        "oom@device=1,step=3,action=F1": ("device 1, action F1: MemoryError; on from",),
        "hang@device=1,step=4,action=BW2": (
            "device 1 hangs in BW2, step 4; ",
            "device 0 waits for the gradient of micro-batch 2 into virtual stage 0 from device 1",
        ),
    },
    "paddle": {
        "kill@device=1,step=2,action=BW1": ("stage 1 was ended by SIGKILL; on from step-00000002",),
        "oom@device=1,step=3,action=F1": ("device 1, action F1: MemoryError; on from",),
        "hang@step=4,action=F3": (
            "device 0 hangs in F3, step 4; ",
            "device 1 waits for the activation of micro-batch 3 into virtual stage 1 from device 0",
        ),
    },
    "tensorflow": {
        "hang@device=1,step=4,action=BW2": (
            "device 1 hangs in BW2, step 4; ",
            "device 0 waits for the gradient",
        ),
    },
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_survives_faults_to_the_bit(tmp_path: Path, framework: str) -> None:
    shared_before = shared_memory()
    one = ["--framework", framework, "--steps", 6]
    assert run(tmp_path / "whole", *one, implementations=IMPLEMENTATIONS) == 0
    faults = REAL[framework]
    options = ["--save-every", 2, "--max-restarts", len(faults), "--hang-timeout", 6]
    hurting = [*one, *options, *given(*faults)]
    assert run(tmp_path / "hurt", *hurting, implementations=IMPLEMENTATIONS) == 0
    hurt, whole = result(tmp_path / "hurt"), result(tmp_path / "whole")
    assert len(hurt.restarts) == len(faults)
    for line, messages in zip(hurt.restarts, faults.values(), strict=True):
        assert all(message in line for message in messages), line
    assert [step.loss for step in hurt.steps] == [step.loss for step in whole.steps]
    assert same(bits(tmp_path / "hurt"), bits(tmp_path / "whole"))
    assert not psutil.Process().children(recursive=True)
    left = {path for path in shared_memory() - shared_before if framework in path.name}
    assert not left


# ---------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@device=1,step=3,action=BW2", Fault("kill", 1, 3, "BW2")),
        ("exception", Fault("exception")),
        ("hang@action=W1.1", Fault("hang", 0, 0, "W1.1")),
        ("oom@step=7,action=optimizer", Fault("oom", 0, 7, "optimizer")),
        ("disk-full@step=2", Fault("disk-full", 0, 2, "save")),
    ],
)
def test_a_fault_reads_back(text: str, fault: Fault) -> None:
    assert Fault.parse(text) == fault
    assert Fault.parse(str(fault)) == fault


@pytest.mark.parametrize(
    "text", ["", "boom", "kill@", "kill@step=-1", "kill@step=x", "kill@action=X3", "kill@place=1"]
)
def test_what_is_no_fault_is_refused_in_one_line(text: str) -> None:
    if text == "kill@":
        assert Fault.parse(text) == Fault("kill")
        return
    with pytest.raises(FaultError, match="expected") as error:
        Fault.parse(text)
    assert "\n" not in str(error.value)


def at(action: str | None, phase: Any = "schedule", step: int = 3) -> Place:
    return Place(phase, step, None if action is None else parse_action(action))


@pytest.mark.parametrize(
    ("places", "lines"),
    [
        (
            [at("BW0"), at("F0")],  # device 1 has F0's input, since device 0 is far beyond it
            [
                "device 0 waits for the gradient of micro-batch 0 into virtual stage 0 from device "
                "1, step 3",
                "device 1 hangs in F0, step 3",
            ],
        ),
        (
            [at("F1"), at("F1")],
            [
                "device 0 hangs in F1, step 3",
                "device 1 waits for the activation of micro-batch 1 into virtual stage 1 from "
                "device 0, step 3",
            ],
        ),
        (
            [at("BW3"), at(None)],
            ["device 0 hangs in BW3, step 3", "device 1 is done with its actions, step 3"],
        ),
        (
            [at(None, "optimizer"), None],
            ["device 0 is in optimizer, step 3", "device 1 has not begun"],
        ),
        (
            [at(None, "save", 2), at("F0")],
            [
                "device 0 is in save, step 2",
                "device 1 waits for the activation of micro-batch 0 into virtual stage 1 from "
                "device 0, step 3",
            ],
        ),
    ],
)
def test_who_hangs_and_who_waits(places: list[Place | None], lines: list[str]) -> None:
    assert explain(CONFIG, places) == lines


def test_who_waits_for_a_backward_that_overlaps() -> None:
    """Device 1 is about to do BW0 of its pair (F2.1&BW0), so it has not sent that gradient yet."""
    config = CONFIG.model_copy(update={"schedule": "dualpipev", "chunks": 2})
    assert config.train.micro_batches == 4
    assert explain(config, [at("BW0"), at("BW0")]) == [
        "device 0 waits for the gradient of micro-batch 0 into virtual stage 0 from device 1, "
        "step 3",
        "device 1 hangs in BW0, step 3",
    ]


def test_the_parent_sees_what_the_devices_do(tmp_path: Path) -> None:
    board = Board(tmp_path, CONFIG)
    assert not board.changed() and board.places() == [None, None]
    watches = [Watch(tmp_path, [device]) for device in (0, 1)]
    for watch in watches:
        watch.enter("schedule", 5)
    watches[1].on_action(1, parse_action("BW2"))
    assert board.changed() and not board.changed()
    assert board.places() == [at(None, step=5), at("BW2", step=5)]
    watches[1].on_action(1, parse_action("BW2"))
    assert board.changed()  # the same place again is progress too
    board.remove()
    Watch(tmp_path, [0]).enter("save", 1)  # nobody watches: nothing happens


def test_of_several_replicas_the_one_that_hangs_is_named(tmp_path: Path) -> None:
    """As rank 0 hears of them, from boards on all hosts; ranks 0 and 1 are stage 0."""
    config = CONFIG.model_copy(update={"replicas": 2})
    lines = []
    for rank, action in enumerate((None, "BW1", None, "BW1")):
        (tmp_path / str(rank)).mkdir()
        board, stage = Board(tmp_path / str(rank), config), rank // 2
        assert board.line(stage) == ""
        watch = Watch(tmp_path / str(rank), [stage])
        watch.enter("schedule", 5)
        watch.on_action(stage, None if action is None else parse_action(action))
        lines.append(board.line(stage))
    assert who_waits(config, lines) == (
        "replica 1: device 1 hangs in BW1, step 5; device 0 waits for the gradient of micro-batch "
        "1 into virtual stage 0 from device 1, step 5"
    )
    assert who_waits(config, [lines[0], "", lines[2], ""]) == (
        "replica 0: device 0 is done with its actions, step 5; device 1 is done with its actions, "
        "step 5; replica 1: device 0 has not begun; device 1 has not begun"
    )


def test_a_worker_that_never_begins_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "endless.py").write_text("while True: pass")
    (tmp_path / "idle.py").write_text("import signal; signal.pause()")
    for module in ("endless", "idle"):
        never = {name: Implementation(module, "numpy", "") for name in FRAMEWORKS}
        assert run(tmp_path / module, "--hang-timeout", "0.1", implementations=never) == 1
        assert result(tmp_path / module).reason == (
            "no progress for 1 s (--hang-timeout): device 0 has not begun; device 1 has not begun"
        )
