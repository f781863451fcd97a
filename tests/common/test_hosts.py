"""Runs over two hosts, and what becomes of them where something breaks: seen in seconds, said in
one line by every host that can still speak, and nothing left behind.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.harness.interpreters import interpreter
from common.harness.launch import IMPLEMENTATIONS, why_missing
from common.report.result import RunResult
from common.runtime.heartbeat import LOST_SECONDS
from common.spec.run import FRAMEWORKS
from tests.hosts import ROOT, Hosts
from tests.waiting import wait_until


def is_here(framework: str) -> bool:
    """Whether this Python has it, which starts the processes on the hosts."""
    known = IMPLEMENTATIONS[framework]
    return why_missing(known) is None and interpreter(known.module) == sys.executable


pytestmark = pytest.mark.skipif(not is_here("torch"), reason="PyTorch is not beside the tests")
SETTINGS = """
preset = "tiny"
device = "cpu"
threads = 1
[model]
dropout = 0.1
[train]
steps = 8
batch_size = 6
micro_batches = 2
"""
FOR_EVER = ["--steps", "1000000"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


def torchrun(
    hosts: Hosts, host: int, folder: Path, *words: str, restarts: int = 0, per_host: int = 1
) -> subprocess.Popen[Any]:
    """Start one host's share of a run over both."""
    run = folder / "run.toml"
    if not run.exists():
        run.write_text(SETTINGS)
    nodes = ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", str(per_host)]
    where = ["--master-addr", hosts.addresses[0], "--master-port", "29400"]
    launcher = ["-m", "torch.distributed.run", *nodes, *where, "--max-restarts", str(restarts)]
    command = [*launcher, "-m", "torch_impl", "train", "run.toml", *words]
    return hosts.start(host, command, folder / f"host-{host}.log", {"OMP_NUM_THREADS": "1"})


def by_tf_config(
    hosts: Hosts, host: int, folder: Path, port: int, *words: str, module: str = "torch_impl"
) -> subprocess.Popen[Any]:
    """As `torchrun` above, with nobody else to notice anything, and no framework to import."""
    cluster = {"worker": [f"{address}:{port}" for address in hosts.addresses]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": host}}
    (folder / "run.toml").write_text(SETTINGS)
    log = folder / f"host-{host}-{port}.log"
    command = ["-m", module, "train", "run.toml", *words]
    return hosts.start(host, command, log, {"TF_CONFIG": json.dumps(config)})


def end_of(process: subprocess.Popen[Any], log: Path) -> tuple[int, list[str]]:
    """The status, and what the ranks themselves said in it."""
    status = process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return status, [line for line in lines if re.match(r"rank |\w+_impl train: ", line)]


def result_in(folder: Path) -> RunResult:
    return RunResult.read(next(folder.glob("results/*/*/result.json")))


def saved(folder: Path) -> dict[str, Any]:
    found = checkpoint.load(checkpoint.checkpoints_in(folder)[-1])
    return {**found.weights, **found.optimizer_state}


def test_a_run_over_hosts_has_the_bits_of_one_process_also_after_a_restart(
    hosts: Hosts, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(SETTINGS)
    command = [sys.executable, "-m", "common.cli", "train", "--config", "run.toml"]
    alone = subprocess.Popen(
        [*command, "--save-dir", "alone"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    # Stage 1 is killed in step 5; torchrun starts both again, and they go on from step 4.
    words = ["--save-dir", "saved", "--save-every", "2", "--resume", "latest", "--out", "over"]
    words += ["--fault", "kill@device=1,step=5"]
    ranks = [torchrun(hosts, n, tmp_path, *words, restarts=2) for n in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert alone.wait() == 0
    one = result_in(tmp_path)
    (folder,) = (path.parent for path in tmp_path.glob("over/*/*/result.json"))
    over = RunResult.read(folder / "result.json")
    assert over.resumed_from == str(tmp_path / "saved" / "step-00000004")
    assert [step.loss for step in over.steps] == [step.loss for step in one.steps[4:]]
    ours, theirs = saved(tmp_path / "saved"), saved(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    said = (tmp_path / "host-0.log").read_text()
    assert "10.77.0.1: replica 0 stage 0" in said and "10.77.0.2: replica 0 stage 1" in said


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_exception_on_one_host_is_the_line_of_all(
    framework: str, hosts: Hosts, tmp_path: Path
) -> None:
    if not is_here(framework):
        pytest.skip(f"{framework} is not beside the tests")
    module, fault = IMPLEMENTATIONS[framework].module, ["--fault", "exception@device=1,step=3"]
    ranks = [by_tf_config(hosts, n, tmp_path, 7000, *fault, module=module) for n in range(2)]
    found = [end_of(rank, tmp_path / f"host-{n}-7000.log") for n, rank in enumerate(ranks)]
    assert [status for status, _ in found] == [1, 1]
    why = "rank 1 (10.77.0.2): StageFailure: device 1, action F0: InjectedFault: "
    (first,), (second,) = (lines for _, lines in found)
    assert first.startswith(f"rank 0 (10.77.0.1): {why}") and second.startswith(why), found


def ended_in_seconds(
    hosts: Hosts, folder: Path, what: str, fault: Callable[[], object]
) -> list[tuple[int, list[str]]]:
    """What both hosts said when a fault happened to a run that would go on for ever."""
    ranks = [torchrun(hosts, n, folder, *FOR_EVER, "--out", what) for n in range(2)]
    wait_until(lambda: list(folder.glob(f"{what}/*/*/progress.jsonl")), ranks[0])
    fault()
    found = [end_of(rank, folder / f"host-{n}.log") for n, rank in enumerate(ranks)]
    assert all(status for status, _ in found), found
    assert [hosts.processes(n) for n in range(2)] == [[], []]  # no orphan
    return found


def test_a_host_that_is_gone(hosts: Hosts, tmp_path: Path) -> None:
    (_, first), _ = ended_in_seconds(hosts, tmp_path, "gone", lambda: hosts.kill(1))
    # By the connection that broke; if not, by the heartbeat.
    assert len(first) == 1 and first[0].startswith("rank 0 (10.77.0.1): "), first


def test_a_network_that_is_cut_for_a_while(hosts: Hosts, tmp_path: Path) -> None:
    """The processes do not find each other again by themselves: the launcher starts them anew."""
    cut = hosts.without(1)
    try:
        (_, first), (_, second) = ended_in_seconds(hosts, tmp_path, "cut", cut.__enter__)
    finally:
        cut.__exit__(None, None, None)
    assert first == [
        f"rank 0 (10.77.0.1): lost rank 1 (10.77.0.2): no sign of life for {LOST_SECONDS:g} s"
    ]
    assert len(second) == 1 and "the store of the run" in second[0], second


def test_hosts_that_differ_say_who_and_in_what(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 400)
    (tmp_path / "b.txt").write_text("The quick brown dog. " * 400)
    cases = [
        (["--seed", "1"], ["--seed", "2"], "rank 1 (10.77.0.2) has seed = 2; expected 1, as rank"),
        (["--corpus", "a.txt"], ["--corpus", "b.txt"], "rank 1 (10.77.0.2) has corpus = "),
        ([], ["--corpus", "c.txt"], "rank 1 (10.77.0.2): --corpus: corpus c.txt: No such"),
        (["--stages", "3"], ["--stages", "3"], "stages x replicas = 3 x 1 takes 3 processes, the"),
        (["--resume", "latest"], [], "--resume latest: of which run?"),
    ]
    ranks = [
        [by_tf_config(hosts, n, tmp_path, port, *words) for n, words in enumerate(case[:2])]
        for port, case in enumerate(cases, start=5000)
    ]
    for port, (own, case) in enumerate(zip(ranks, cases, strict=True), start=5000):
        for n, rank in enumerate(own):
            status, lines = end_of(rank, tmp_path / f"host-{n}-{port}.log")
            assert status == 2 and len(lines) == 1 and case[2] in lines[0], (case, n, lines)


def test_without_the_others_a_process_says_who_does_not_come(hosts: Hosts, tmp_path: Path) -> None:
    waits = ["--join-timeout", "2"]
    alone = by_tf_config(hosts, 0, tmp_path, 6000, *waits)
    lost = by_tf_config(hosts, 1, tmp_path, 6001, *waits)
    listener = "import socket; s = socket.create_server(('', 6003)); print(flush=True); s.accept()"
    log = tmp_path / "listener.log"
    listening = hosts.start(0, ["-c", listener], log)
    wait_until(lambda: log.read_text(), listening)
    in_use = by_tf_config(hosts, 0, tmp_path, 6002, *waits)
    for process, name, message in (
        (alone, "host-0-6000.log", "rank 1 did not come within 2 s (--join-timeout)"),
        (lost, "host-1-6001.log", "cannot reach the store of the run at 10.77.0.1:6002: "),
        (in_use, "host-0-6002.log", "cannot hold the store of the run at 10.77.0.1:6003: "),
    ):
        status, lines = end_of(process, tmp_path / name)
        assert status == 2 and len(lines) == 1 and message in lines[0], lines
    listening.kill()
    listening.wait()
