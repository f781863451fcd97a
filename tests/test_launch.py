"""Children that end well, raise, crash, hang, are killed, or leave something behind."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import psutil
import pytest

from common.runtime import launch
from common.runtime.job import Job
from common.runtime.launch import ORACLE_MODULE, Implementation, Interrupted, Outcome, run_jobs_in_child, why_missing
from common.runtime.oracle_worker import memory_bytes
from common.spec import RunConfig, TrainSpec, TransformerSpec, preset

CONFIG = RunConfig(
    model=TransformerSpec(context_length=4, num_layers=1, d_model=8, num_heads=2, d_ff=8),
    train=TrainSpec(steps=3, batch_size=2, micro_batches=2, dtype="float64"),
)


MARK = uuid.uuid4().hex


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("FAKE_MARK", MARK)
    monkeypatch.setattr(launch, "TERMINATE_SECONDS", 0.3)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, timeout_seconds: float = 60.0) -> Outcome:
    if fault:
        monkeypatch.setenv("FAKE_FAULTS", f"torch={fault}")
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"))]
    return run_jobs_in_child("fakes.impl", jobs, tmp_path, timeout_seconds)[0]


def no_child_left() -> bool:
    return not psutil.Process().children(recursive=True) and not any(
        MARK in (process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
        if process.status() != psutil.STATUS_ZOMBIE
    )


def test_a_good_run_has_all_parts_and_reports_its_steps(tmp_path: Path) -> None:
    jobs = [Job(config=CONFIG, out=str(tmp_path / name)) for name in ("a", "b")]
    seen: list[tuple[int, int]] = []
    outcomes = run_jobs_in_child("fakes.impl", jobs, tmp_path, 60.0, lambda job, step, loss: seen.append((job, step)))
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert [part.devices for part in outcomes[1].parts] == [(0, 1)]
    assert sorted(seen) == [(job, step) for job in (0, 1) for step in (0, 1, 2)]


def test_the_oracle_runs_as_a_child(tmp_path: Path) -> None:
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"), kind="probe", noise=0.1)]
    assert run_jobs_in_child(ORACLE_MODULE, jobs, tmp_path, 60.0)[0].status == "ok"
    assert (tmp_path / "job" / "part-0.safetensors").exists()


def test_the_oracle_knows_what_memory_it_needs() -> None:
    assert memory_bytes(preset("small")) == pytest.approx(0.9e9, rel=0.05)  # measured
    assert memory_bytes(preset("gpt2-small")) > 20e9


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "ValueError: a fault in step 1"),
        ("crash", "crashed with SIGSEGV"),
        ("out-of-memory", "killed by SIGKILL: most likely out of memory"),
        ("exit", "SomeError: gave up"),
    ],
)
def test_a_dying_child_is_a_failed_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    outcome = run(tmp_path, monkeypatch, fault)
    assert outcome.status == "failed"
    assert outcome.reason.startswith(reason)
    assert outcome.log is not None and outcome.log.exists()
    assert not outcome.parts


@pytest.mark.parametrize("fault", ["hang", "stubborn"])
def test_a_hang_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    began = time.monotonic()
    outcome = run(tmp_path, monkeypatch, fault, timeout_seconds=3.0)
    assert (outcome.status, outcome.reason) == ("failed", "no result within 3 s (--timeout)")
    assert time.monotonic() - began < 10
    assert no_child_left()


def test_what_a_good_child_leaves_behind_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, "orphan").status == "ok"
    assert no_child_left()


def test_a_missing_part_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job").mkdir()
    assert run(tmp_path, monkeypatch, "").status == "ok"
    path = tmp_path / "job" / "part-0.json"
    path.write_text(path.read_text().replace('"devices":[0,1]', '"devices":[0]'))
    job = Job(config=CONFIG, out=str(tmp_path / "job"))
    outcome = launch._outcome(job, tmp_path / "child.log", "ended", 1.0)
    assert (outcome.status, outcome.reason) == ("failed", "ended; no result from device 1")


def test_a_stop_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULTS", "torch=hang")
    stop: list[bool] = []
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"))]
    with pytest.raises(Interrupted):
        run_jobs_in_child("fakes.impl", jobs, tmp_path, 60.0, lambda *_: stop.append(True), lambda: bool(stop))
    assert no_child_left()


def test_a_missing_framework_says_how_to_install_it() -> None:
    reason = why_missing(Implementation("fakes.impl", "no_such_framework", "pip install it"))
    assert reason == "no_such_framework is not installed; pip install it"
    assert why_missing(Implementation("fakes.impl", "numpy", "")) is None
