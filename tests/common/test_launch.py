"""Workers that end well, raise, crash, hang, are killed, or leave something behind."""

from __future__ import annotations

import errno
import math
import os
import socket
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from common.harness import launch
from common.harness.launch import (
    ORACLE_MODULE,
    Implementation,
    Interrupted,
    run_jobs_in_worker,
    why_missing,
)
from common.runtime import cpus
from common.runtime.job import Job, JobFile
from common.runtime.oracle_worker import memory_bytes
from common.runtime.outcome import Outcome
from common.schedule import generators
from common.schedule.generators import make_schedule
from common.spec.run import RunConfig, TrainSpec, TransformerSpec, preset
from tests.program import words
from tests.waiting import LONG_SECONDS, marked, time_jumps

CONFIG = RunConfig(
    model=TransformerSpec(context_length=4, num_layers=1, d_model=8, num_heads=2, d_ff=8),
    train=TrainSpec(steps=3, batch_size=2, micro_batches=2, dtype="float64"),
)


MARK = uuid.uuid4().hex
FAKE = "tests.fakes.impl"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MARK", MARK)
    monkeypatch.setattr(launch, "TERMINATE_SECONDS", 0.3)


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, timeout_seconds: float = math.inf
) -> Outcome:
    if fault:
        monkeypatch.setenv("FAKE_FAULTS", f"torch={fault}")
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"))]
    return run_jobs_in_worker(FAKE, jobs, tmp_path, timeout_seconds)[0]


def no_worker_left() -> bool:
    return not psutil.Process().children(recursive=True) and not marked(MARK)


def test_a_good_run_has_all_parts_and_reports_its_steps(tmp_path: Path) -> None:
    jobs = [Job(config=CONFIG, out=str(tmp_path / name)) for name in ("a", "b")]
    seen: list[tuple[int, int]] = []
    outcomes = run_jobs_in_worker(
        FAKE, jobs, tmp_path, on_step=lambda job, step, loss: seen.append((job, step))
    )
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert [part.devices for part in outcomes[1].parts] == [(0, 1)]
    assert sorted(seen) == [(job, step) for job in (0, 1) for step in (0, 1, 2)]


def test_a_schedule_in_a_file_is_the_one_that_the_parent_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the file while the workers of a benchmark start one after another."""
    path = tmp_path / "mine.txt"
    path.write_text("0: F0 BW0\n1: F0 BW0\n")
    config = CONFIG.model_copy(update={"schedule": f"file:{path}"})
    monkeypatch.setattr(generators, "kept", {})
    generators.keep_schedule(config.schedule)
    asked = make_schedule(config.schedule, 2, 1)
    path.write_text("0: F0 F1 BW0 BW1\n1: F0 BW0 F1 BW1\n")
    JobFile(jobs=(Job(config=config, out=str(tmp_path)),)).write(tmp_path / "jobs.json")
    assert make_schedule(config.schedule, 2, 1) == asked
    generators.kept.clear()  # as in a worker
    JobFile.read(tmp_path / "jobs.json")
    path.unlink()
    assert make_schedule(config.schedule, 2, 1) == asked


def test_the_oracle_runs_as_a_worker(tmp_path: Path) -> None:
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"), kind="probe", noise=0.1)]
    assert run_jobs_in_worker(ORACLE_MODULE, jobs, tmp_path)[0].status == "ok"
    assert (tmp_path / "job" / "part-0.safetensors").exists()


def test_the_oracle_knows_what_memory_it_needs() -> None:
    assert memory_bytes(preset("small")) == pytest.approx(0.9e9, rel=0.05)  # measured
    for name in ("gpt2-small", "llama-100m"):  # a sequence at a time
        assert 5e9 < memory_bytes(preset(name)) < 15e9


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "ValueError: a fault in step 1"),
        ("crash", "crashed with SIGSEGV"),
        ("out-of-memory", "killed by SIGKILL: most likely out of memory"),
        ("exit", "SomeError: gave up"),
    ],
)
def test_a_dying_worker_is_a_failed_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    outcome = run(tmp_path, monkeypatch, fault)
    assert outcome.status == "failed"
    assert outcome.reason.startswith(reason)
    assert outcome.log is not None and outcome.log.exists()
    assert not outcome.parts


@pytest.mark.parametrize("fault", ["hang", "stubborn"])
def test_a_hang_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    time_jumps(monkeypatch, lambda: marked(MARK))
    outcome = run(tmp_path, monkeypatch, fault, LONG_SECONDS)
    assert (outcome.status, outcome.reason) == ("failed", "no result within 100000 s (--timeout)")
    assert no_worker_left()


def test_what_a_good_worker_leaves_behind_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, "orphan").status == "ok"
    assert no_worker_left()


def test_a_missing_part_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job").mkdir()
    assert run(tmp_path, monkeypatch, "").status == "ok"
    path = tmp_path / "job" / "part-0.json"
    path.write_text(path.read_text().replace('"devices":[0,1]', '"devices":[0]'))
    job = Job(config=CONFIG, out=str(tmp_path / "job"))
    outcome = launch._outcome(job, tmp_path / "worker.log", "ended", 1.0)
    assert (outcome.status, outcome.reason) == ("failed", "ended; no result from device 1")


def test_a_stop_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULTS", "torch=hang")
    stop: list[bool] = []
    jobs = [Job(config=CONFIG, out=str(tmp_path / "job"))]
    with pytest.raises(Interrupted):
        run_jobs_in_worker(
            FAKE, jobs, tmp_path, on_step=lambda *_: stop.append(True), stopped=lambda: bool(stop)
        )
    assert no_worker_left()


def test_the_working_directory_is_not_on_a_workers_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("common/__init__.py", "tests/__init__.py", "queue.py", "random.py", "numpy.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    # An empty entry is the working directory too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    assert run(tmp_path, monkeypatch, "").status == "ok"


def test_what_changes_numbers_stays_behind_and_the_rest_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = words(
        "TF_XLA_FLAGS XLA_FLAGS KERAS_HOME KERAS_BACKEND NVIDIA_TF32_OVERRIDE RANK MASTER_ADDR "
        "PADDLE_TRAINER_ID TORCHELASTIC_USE_AGENT_STORE PYTHONWARNINGS PYTHONOPTIMIZE "
        "FLAGS_prim_all"
    )
    reported = {"OMP_NUM_THREADS": "7", "MKL_CBWR": "COMPATIBLE", "FLAGS_check_nan_inf": "1"}
    for name, value in (dict.fromkeys(left, "1") | {"PYTHONWARNINGS": "error"} | reported).items():
        monkeypatch.setenv(name, value)
    environment = run(tmp_path, monkeypatch, "").parts[0].environment
    assert set(left) <= set(environment["ignored_variables"])
    assert reported.items() <= environment["variables"].items()
    assert not set(left) & set(environment["variables"])


def test_cpus_are_those_of_the_affinity_or_of_a_cgroups_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    for path, text in {
        "v1/cpu/a/b/cpu.cfs_quota_us": "-1",
        "v1/cpu/a/b/cpu.cfs_period_us": "100000",
        "v1/cpu/a/cpu.cfs_quota_us": "250000",
        "v1/cpu/a/cpu.cfs_period_us": "100000",
        "v2/a/cpu.max": "max 100000",
        "v2/cpu.max": "50000 100000",  # a container's root, whatever the cgroup is called outside
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    own.write_text("7:memory:/\n3:cpu,cpuacct:/a/b\n")
    assert list(cpus.cgroup_quotas(tmp_path / "v1", own)) == [2.5]
    own.write_text("0::/a/gone\n")
    assert list(cpus.cgroup_quotas(tmp_path / "v2", own)) == [0.5]
    assert list(cpus.cgroup_quotas(tmp_path / "v2", tmp_path / "none")) == []
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for quotas, usable in (([], 8), ([2.5, 16.0], 3), ([0.5], 1)):
        monkeypatch.setattr(cpus, "cgroup_quotas", lambda quotas=quotas: iter(quotas))
        assert cpus.usable_cpus() == usable
        assert cpus.threads_per_stage(2, None) == max(1, usable // 2)
    assert cpus.threads_per_stage(2, 6) == 3


def test_no_loopback_interface_is_known_before_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object) -> NoReturn:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    paddle = Implementation(FAKE, "numpy", "", ("table",))
    said = str(why_missing(paddle, "table"))
    assert said.startswith("no loopback interface, over which its stages talk")
    assert why_missing(replace(paddle, process_executors=("native",)), "table") is None


@pytest.mark.parametrize("module", [ORACLE_MODULE, "torch_impl", "tf_impl", "paddle_impl"])
@pytest.mark.parametrize(
    ("text", "said"),
    [('{"jobs": []}', "no job in it"), ('{"jobs": 3}', "jobs = 3"), (None, "readable")],
)
def test_a_wrong_job_file_is_one_line_in_every_implementation(
    tmp_path: Path, module: str, text: str | None, said: str
) -> None:
    file = tmp_path / "jobs.json"
    if text is not None:
        file.write_text(text)
    command = launch.worker_command(module, str(file))
    done = subprocess.run(
        command, env=launch.worker_environment(module), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr


def test_a_missing_framework_says_how_to_install_it() -> None:
    reason = why_missing(Implementation(FAKE, "no_such_framework", "pip install it"))
    assert reason == "no_such_framework is not installed; pip install it"
    assert why_missing(Implementation(FAKE, "numpy", "")) is None
