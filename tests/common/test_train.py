"""The subcommand train: checkpoints as it goes, on from them to the bit, restarts, and a stop at
what is not finite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.cli import train
from common.harness import launch
from common.report.result import RunResult
from common.spec.run import RunConfig, TrainSpec
from tests.checkpoints import same, tensors_of
from tests.program import MORTAL, SMALL, assert_refused, call, with_defaults, words
from tests.waiting import LONG_SECONDS, time_jumps, wait_until

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {**SMALL, "--steps": 8, "--dropout": 0.1}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "marks"))
    monkeypatch.setattr(launch, "TERMINATE_SECONDS", 0.3)


def run(*argv: Any) -> int:
    return call(["train", *with_defaults(TRAINING, argv)], MORTAL, train)


def result(out: Path) -> RunResult:
    return RunResult.read(next(out.glob("*/*/result.json")))


def weights(directory: Path) -> dict[str, Any]:
    return tensors_of(checkpoint.checkpoints_in(directory)[-1])


@pytest.fixture
def whole(tmp_path: Path) -> tuple[list[float], dict[str, Any]]:
    """The run that nothing interrupts: its losses and its last checkpoint."""
    assert run("--out", tmp_path / "whole", "--save-dir", tmp_path / "whole-checkpoints") == 0
    found = result(tmp_path / "whole")
    return [step.loss for step in found.steps], weights(tmp_path / "whole-checkpoints")


def test_resume_continues_data_learning_rate_and_dropout_to_the_bit(
    tmp_path: Path, whole: tuple[list[float], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "checkpoints"
    cosine = ["--learning-rate-schedule", "constant"]
    few = words("--save-dir {saves} --steps 5 --save-every 2 --keep 2", saves=saves)
    assert run(*cosine, "--out", tmp_path / "a", *few) == 0
    names = [path.name for path in checkpoint.checkpoints_in(saves)]
    assert names == ["step-00000004", "step-00000005"]
    on = words("--save-dir {saves} --resume latest --framework paddle", saves=saves)
    assert run("--out", tmp_path / "b", *on) == 0
    joined = [step.loss for part in "ab" for step in result(tmp_path / part).steps]
    assert joined == whole[0]
    assert same(weights(saves), whole[1])
    later = result(tmp_path / "b")
    assert (later.steps[0].step, later.resumed_from) == (5, str(saves / "step-00000005"))
    text = capsys.readouterr().out
    assert "step      8  loss " in text and "held-out loss" in text
    assert f"checkpoint: {saves / 'step-00000008'}" in text


@pytest.mark.parametrize("deaths", ["kill@3", "raise@0", "kill@2,raise@5,kill@7"])
def test_restarts_lose_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[list[float], dict[str, Any]],
    deaths: str,
) -> None:
    monkeypatch.setenv("FAKE_DEATHS", deaths)
    saves = tmp_path / "checkpoints"
    options = words("--save-dir {saves} --save-every 2 --max-restarts 3", saves=saves)
    assert run("--out", tmp_path / "a", *options) == 0
    found = result(tmp_path / "a")
    assert [step.step for step in found.steps] == list(range(8))
    assert [step.loss for step in found.steps] == whole[0]
    assert same(weights(saves), whole[1])
    assert len(found.restarts) == len(deaths.split(","))
    first = found.restarts[0]
    assert "SIGKILL" in first or "ValueError: gave up; on from its beginning" in first


def test_no_gradients_are_left_of_any_line(tmp_path: Path) -> None:
    for folder in (tmp_path / "attempt-1", tmp_path / "attempt-1" / "line-1"):
        folder.mkdir()
        (folder / "part-0.safetensors").touch()
    train.drop_tensors(SimpleNamespace(folder=tmp_path, text=None))  # type: ignore[arg-type]
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_without_restarts_a_death_is_a_failure_that_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_DEATHS", "raise@3")
    assert run("--out", tmp_path / "a", "--save-every", 2) == 1
    found = result(tmp_path / "a")
    assert (found.status, found.reason, len(found.steps)) == ("failed", "ValueError: gave up", 3)
    saves = next((tmp_path / "a").glob("*/checkpoints"))
    assert [path.name for path in checkpoint.checkpoints_in(saves)] == ["step-00000002"]
    assert f"checkpoint: {saves / 'step-00000002'}" in capsys.readouterr().out


def test_a_hang_ends_by_the_timeout_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEATHS", "hang@3")
    time_jumps(monkeypatch, (tmp_path / "marks" / "hang@3").exists)
    options = ["--save-every", 2, "--max-restarts", 1, "--timeout", LONG_SECONDS]
    assert run("--out", tmp_path / "a", *options) == 0
    assert "no result within 100000 s (--timeout)" in result(tmp_path / "a").restarts[0]


@pytest.mark.parametrize(
    ("death", "what"),
    [
        (
            "nan-weight@3",
            "step 4: the loss is nan; the first tensor that is not finite: weight "
            "block.0.feed_forward.up",
        ),
        (
            "nan-moment@3",
            "step 4: the weights after it are not finite; the first tensor that is not finite: "
            "weight block.0",
        ),
        (
            "nan-activation@3",
            "the first tensor that is not finite: output of block.1 for micro-batch 0",
        ),
        (
            "nan-gradient@3",
            "norm is nan; the first tensor that is not finite: gradient of block.1.norm_2.bias",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stops_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, what: str
) -> None:
    monkeypatch.setenv("FAKE_DEATHS", death)
    assert run("--out", tmp_path / "a", "--save-every", 1, "--max-restarts", 3) == 1
    found = result(tmp_path / "a")
    assert what in found.reason and not found.restarts
    assert [step.step for step in found.steps][:3] == [0, 1, 2]
    saves = next((tmp_path / "a").glob("*/checkpoints"))
    assert checkpoint.newest(saves) == saves / "step-00000003"


def test_a_damaged_checkpoint_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "checkpoints"
    assert run("--out", tmp_path / "a", "--save-dir", saves, "--steps", 4, "--save-every", 2) == 0
    os.truncate(saves / "step-00000004" / "shard-00000.safetensors", 100)
    assert run("--out", tmp_path / "b", "--save-dir", saves, "--resume", "latest") == 0
    text = capsys.readouterr().out
    assert "has 100 bytes; expected" in text
    assert "set aside as damaged-step-00000004-1; going on from step-00000002" in text
    assert checkpoint.newest(saves) == saves / "step-00000008"


def test_weights_alone_start_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = tmp_path / "checkpoints"
    assert run("--out", tmp_path / "a", "--save-dir", saves, "--steps", 2) == 0
    other = ["--weights", saves / "step-00000002", "--dropout", 0.3, "--seed", 1, "--steps", 4]
    still = [*other, "--optimizer", "sgd", "--learning-rate", 1e-30, "--weight-decay", 0]
    assert run("--out", tmp_path / "b", "--save-dir", tmp_path / "still", *still) == 0
    assert [step.step for step in result(tmp_path / "b").steps] == [0, 1, 2, 3]
    expected = checkpoint.load(saves / "step-00000002").weights
    for name, value in checkpoint.load(tmp_path / "still" / "step-00000004").weights.items():
        np.testing.assert_array_equal(value, expected[name])
    manifest = checkpoint.read_manifest(saves / "step-00000002").without_training()
    in_float32 = RunConfig(model=manifest.model, train=TrainSpec(dtype="float32"))
    assert checkpoint.differences(manifest, in_float32) == []
    assert run("--out", tmp_path / "c", "--save-dir", tmp_path / "whole", *other) == 0
    monkeypatch.setenv("FAKE_DEATHS", "kill@2")
    argv = [*other, "--save-every", 1, "--max-restarts", 1]
    assert run("--out", tmp_path / "d", "--save-dir", tmp_path / "joined", *argv) == 0
    # On from its own checkpoint, not from the weights again.
    assert len(result(tmp_path / "d").restarts) == 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "joined"))


def test_wrong_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "checkpoints"
    assert run("--out", tmp_path / "a", "--save-dir", saves, "--steps", 2) == 0
    last = saves / "step-00000002"
    capsys.readouterr()
    wrong = {
        f"--save-dir {saves}": "holds step-00000002 of an earlier run; expected --resume latest",
        "--resume latest": "add --save-dir DIR",
        f"--resume latest --save-dir {tmp_path / 'none'}": "no whole checkpoint in",
        f"--resume {tmp_path / 'none'}": "expected a file of a checkpoint",
        f"--resume {saves}": f"expected one of them, such as {last}",
        f"--resume {last} --seed 1": "train.seed: the checkpoint has 0, the run 1; what may "
        "change: framework",
        f"--resume {last} --norm post --seed 1": "model.norm: the checkpoint has pre, the run post "
        "(and 1 more)",
        f"--resume {last} --steps 9 --fault kill@step=1": "has done step 1; expected 2 or more",
        f"--resume {last} --steps 2": "all 2 of 2 steps are done; use more --steps",
        f"--resume {last} --dtype float32": "train.dtype: the checkpoint has float64, the "
        "run float32",
        f"--resume {last} --weights {last}": "--resume goes on with a training and --weights "
        "starts another",
        f"--weights {last} --norm post": "model.norm: the checkpoint has pre, the run post; what "
        "may change",
        f"--weights {saves}": f"expected one of them, such as {last}",
        "--momentum 0.9": "--momentum = 0.9: adamw has none; expected with --optimizer sgd",
        "--optimizer sgd --beta1 0.5": "--beta1 = 0.5: sgd has none; expected with "
        "--optimizer adamw",
        "--dropout 0 --dropout-masks native": "--dropout-masks = native: nothing is dropped",
        "--fault kill@step=1 --fault kill@step=2": "--fault: 2 of them for 1 worker process; "
        "expected --max-restarts 1",
        "--keep 2 --keep 3": "--keep: given twice; expected once",
        "--save-every 0": "--save-every: '0'; expected a whole number, at least 1",
        "--framework jax": "--framework = 'jax': unknown; expected one of torch, "
        "tensorflow, paddle",
        "--preset tinny": "--preset = 'tinny': unknown; expected tiny",
        "--stages 9": "expected at most 4",
    }
    for line, message in wrong.items():
        assert_refused(run("--out", tmp_path / "b", *line.split()), message, capsys)
    assert not (tmp_path / "b").exists()


def test_an_interruption_leaves_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.common import test_train; sys.exit(test_train.run(*sys.argv[1:]))"
    )
    argv = words("--out {home}/a --save-dir {home}/saves --save-every 1", home=tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"FAKE_DEATHS": "hang@3"},
    )
    wait_until((tmp_path / "saves" / "step-00000003").exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in output and "Traceback" not in output
    assert result(tmp_path / "a").reason == "interrupted" and len(result(tmp_path / "a").steps) == 3
    assert checkpoint.newest(tmp_path / "saves") == tmp_path / "saves" / "step-00000003"
