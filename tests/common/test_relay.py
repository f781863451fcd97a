"""One training handed from framework to framework, against the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.harness.launch import IMPLEMENTATIONS, Implementation
from tests.campaigns import relay
from tests.program import MORTAL, assert_refused, call, words

LEGS = "torch:p=2:1f1b:6,paddle:p=4:1f1b:12,tensorflow:p=3:interleaved:18"


def run(implementations: dict[str, Implementation], *argv: Any) -> int:
    return call(["relay", *argv], implementations, relay)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_MARK", str(tmp_path))


def test_three_frameworks_in_turn_train_as_the_oracle_does(tmp_path: Path) -> None:
    assert run(dict(IMPLEMENTATIONS), "--legs", LEGS, "--out", tmp_path / "out") == 0
    found = json.loads(next(tmp_path.glob("out/*/relay.json")).read_text())
    assert found["passed"] and len(found["oracle_losses"]) == 18
    legs = found["legs"]
    did = [(leg["config"]["framework"], leg["first_step"], len(leg["losses"])) for leg in legs]
    assert did == [("torch", 0, 6), ("paddle", 6, 6), ("tensorflow", 12, 6)]
    assert max(leg["loss_difference"] for leg in legs) < 1e-11
    assert max(leg["weight_difference"] for leg in legs) < 1e-10
    assert next(tmp_path.glob("out/*/relay.png")).stat().st_size > 10_000


def test_a_leg_that_trains_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_DEATHS", "wrong@3")
    assert run(MORTAL, "--legs", "torch:p=2:1f1b:2,paddle:gpipe:4", "--out", tmp_path / "out") == 1
    assert "FAIL: losses differ from 4 uninterrupted steps" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_DEATHS", "raise@3")
    (tmp_path / "raise@3").unlink(missing_ok=True)
    assert (
        run(MORTAL, "--legs", "torch:p=2:1f1b:2,paddle:gpipe:4", "--out", tmp_path / "again") == 1
    )
    assert "failed: ValueError: gave up" in capsys.readouterr().out


def test_what_the_legs_say_is_said_there_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("stages = 2\n")
    leg = words("--legs torch:1f1b:2 --out {home}/out", home=tmp_path)
    status = run(MORTAL, *leg, "--config", tmp_path / "a.toml")
    assert_refused(status, "a.toml: stages: not a setting of this command", capsys)
    status = run(MORTAL, *leg, "--warmup-steps", 3)
    assert_refused(status, "warmup_steps = 3 is more than steps = 2", capsys)


@pytest.mark.parametrize(
    ("legs", "message"),
    [
        ("torch:p=2:1f1b", "expected FRAMEWORK:p=STAGES:SCHEDULE:STEPS_DONE"),
        ("jax:1f1b:3", "'jax': unknown; expected one of torch, tensorflow, paddle"),
        ("torch:1f1b:3,paddle:1f1b:3", "end after [3, 3] steps; expected increasing numbers"),
        ("torch:p=9:1f1b:3", "stages x chunks = 9 is more than the 6 units"),
        ("torch:m=13:1f1b:3", "micro_batches = 13 is more than batch_size = 12"),
        ("torch:nonsense:3", "schedule 'nonsense' is unknown"),
    ],
)
def test_wrong_legs_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], legs: str, message: str
) -> None:
    assert_refused(run(MORTAL, "--legs", legs, "--out", tmp_path / "out"), message, capsys)
