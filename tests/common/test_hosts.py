"""Runs over two hosts, and what becomes of them where something breaks: seen in seconds, said in
one line by every host that can still speak, and nothing left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
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
from tests.campaigns.hosts import slow_link
from tests.campaigns.hosts_page import Link
from tests.hosts import ROOT, Hosts, with_another_wall_clock
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
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="a part is in C")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


def torchrun(
    hosts: Hosts,
    host: int,
    folder: Path,
    *words: str,
    restarts: int = 0,
    env: Mapping[str, str] = {},
    **where: Any,
) -> subprocess.Popen[Any]:
    """Start one host's share of a run over both."""
    run = folder / "run.toml"
    if not run.exists():
        run.write_text(SETTINGS)
    nodes = ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1"]
    master = ["--master-addr", hosts.addresses[0], "--master-port", "29400"]
    launcher = ["-m", "torch.distributed.run", *nodes, *master, "--max-restarts", str(restarts)]
    command = [*launcher, "-m", "torch_impl", "train", "run.toml", *words]
    log = folder / f"host-{host}.log"
    return hosts.start(host, command, log, {"OMP_NUM_THREADS": "1", **env}, **where)


def by_tf_config(
    hosts: Hosts,
    host: int,
    folder: Path,
    port: int,
    *words: str,
    module: str = "torch_impl",
    network: str = "10.77.0",
    project: str = str(ROOT),
) -> subprocess.Popen[Any]:
    """As `torchrun` above, with nobody else to notice anything, and no framework to import."""
    cluster = {"worker": [f"{network}.{n + 1}:{port}" for n in range(2)]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": host}}
    (folder / "run.toml").write_text(SETTINGS)
    log = folder / f"host-{host}-{port}.log"
    command = ["-m", module, "train", "run.toml", *words]
    env = {"TF_CONFIG": json.dumps(config), "PYTHONPATH": project}
    return hosts.start(host, command, log, env)


def said_in(log: Path) -> list[str]:
    """What the ranks themselves said went wrong."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if re.match(r"rank |\w+_impl train: ", line)]


def end_of(process: subprocess.Popen[Any], log: Path) -> tuple[int, list[str]]:
    return process.wait(), said_in(log)


def results_in(folder: Path) -> list[RunResult]:
    """Of all attempts, the first one first."""
    return [RunResult.read(path) for path in sorted(folder.glob("*/*/result.json"))]


def saved(folder: Path) -> dict[str, Any]:
    found = checkpoint.load(checkpoint.checkpoints_in(folder)[-1])
    return {**found.weights, **found.optimizer_state}


@needs_a_compiler
def test_a_run_over_hosts_has_the_bits_of_one_process_also_after_a_restart(
    hosts: Hosts, tmp_path: Path
) -> None:
    """The second host has folders of its own, a clock that is an hour ahead (CLOCK_MONOTONIC), and
    a wall clock that is an hour behind.
    """
    behind = with_another_wall_clock(tmp_path)
    tell = [sys.executable, "-c", "import time; print(time.time())"]
    told = subprocess.check_output(tell, env=os.environ | behind)
    assert 3500 < time.time() - float(told) < 3700
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
    own = [tmp_path / "saved", tmp_path / "over"]
    for path in own:
        path.mkdir()
    ranks = [
        torchrun(hosts, 0, tmp_path, *words, restarts=2),
        torchrun(hosts, 1, tmp_path, *words, restarts=2, env=behind, own=own, ahead_seconds=3600),
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert alone.wait() == 0
    (one,), (failed, over) = results_in(tmp_path / "results"), results_in(tmp_path / "over")
    assert failed.status == "failed" and "peer" in failed.reason
    (log,) = (tmp_path / "over").glob(f"*/{failed.log}")
    assert "Traceback" in log.read_text()
    assert [step.loss for step in failed.steps] == [step.loss for step in one.steps[:5]]
    assert over.resumed_from == str(tmp_path / "saved" / "step-00000004")
    assert [step.loss for step in over.steps] == [step.loss for step in one.steps[4:]]
    ends = [event.end_seconds for row in over.median_step_events.values() for event in row]
    assert max(ends) - min(ends) < 1800, "the times are not on one clock"
    ours, theirs = saved(tmp_path / "saved"), saved(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in (tmp_path / "saved").glob(".step*")] == []
    said = (tmp_path / "host-0.log").read_text()
    assert "10.77.0.1: replica 0 stage 0" in said and "10.77.0.2: replica 0 stage 1" in said


def test_the_host_says_what_is_wrong_before_a_launcher_can_end_it(tmp_path: Path) -> None:
    """torchrun ends all its processes as soon as one has ended."""
    (tmp_path / "run.toml").write_text(SETTINGS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "torch_impl", "train", "run.toml", "--elastic"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = [line for line in ended.stderr.splitlines() if line.startswith("torch_impl train: ")]
    assert len(said) == 1 and said[0].endswith("the launcher started 3; expected as many")


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


def steps_in(folder: Path) -> int:
    """How many the newest attempt has done."""
    results = sorted(folder.glob("*/*/result.json"))
    progress = results[-1].with_name("progress.jsonl") if results else None
    return len(progress.read_text().splitlines()) if progress and progress.exists() else 0


def test_a_host_that_is_gone(hosts: Hosts, tmp_path: Path) -> None:
    """An elastic launcher goes on with the hosts that are left, and they with fewer replicas: from
    the last checkpoint, with the bits of so many replicas.
    """
    (tmp_path / "run.toml").write_text(SETTINGS)
    words = ["--stages", "1", *FOR_EVER, "--save-every", "1"]
    saving = ["--save-dir", "saved", "--keep", "1000000", "--resume", "latest"]
    ranks = []
    for n in range(2):
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.addresses[0]}:29400"]
        meeting += ["--rdzv-conf", f"is_host={1 - n},last_call_timeout=1"]
        launcher = ["-m", "torch.distributed.run", "--nnodes", "1:2", *meeting]
        launcher += ["--local-addr", hosts.addresses[n], "--max-restarts", "3"]
        command = ["-m", "torch_impl", "train", "run.toml", *words, *saving, "--elastic"]
        command += ["--replicas", "99", "--compress", "fp16"]  # which one replica has no use for
        log = tmp_path / f"host-{n}.log"
        ranks.append(hosts.start(n, [*launcher, *command], log, {"OMP_NUM_THREADS": "1"}))
    out = tmp_path / "results"
    wait_until(lambda: steps_in(out), ranks[0])
    hosts.kill(1)
    wait_until(lambda: len(results_in(out)) == 2 and steps_in(out) > 2, ranks[0])
    ranks[0].terminate()
    assert ranks[0].wait() and ranks[1].wait()
    assert [hosts.processes(n) for n in range(2)] == [[], []]  # no orphan
    # By the connection that broke; if not, by the heartbeat.
    (said,) = said_in(tmp_path / "host-0.log")
    assert said.startswith("rank 0 (10.77.0.1): ")
    first, second = results_in(out)
    assert [result.config.replicas for result in (first, second)] == [2, 1]
    assert [result.config.compress for result in (first, second)] == ["fp16", "none"]
    assert second.resumed_from == str(tmp_path / "saved" / f"step-{second.steps[0].step:08}")
    assert went_on_alone(tmp_path, second, "torch", words)


def why_no_etcd() -> str | None:
    """Why Paddle's elastic launcher cannot run here."""
    if not is_here("paddle"):
        return "Paddle is not beside the tests"
    if shutil.which("etcd") is None:
        return "etcd is not installed (Debian: apt install etcd-server)"
    if find_spec("etcd3") is None:
        return "Paddle's client of etcd is not installed (pip install etcd3)"
    return None


@pytest.mark.skipif(why_no_etcd() is not None, reason=str(why_no_etcd()))
def test_paddles_elastic_launcher(hosts: Hosts, tmp_path: Path) -> None:
    """A process is killed: both hosts go on from the last checkpoint. A host is gone, after that:
    the other goes on alone. Each with the bits of a run that was never interrupted.
    """
    (tmp_path / "run.toml").write_text(SETTINGS)
    words = ["--stages", "1", *FOR_EVER, "--save-every", "4"]
    saving = ["--save-dir", "saved", "--keep", "1000000", "--resume", "latest"]
    server = ["--data-dir", str(tmp_path / "etcd"), "--listen-client-urls", "http://0.0.0.0:2379"]
    server += ["--advertise-client-urls", f"http://{hosts.addresses[0]}:2379"]
    with (tmp_path / "etcd.log").open("wb") as log:
        etcd = subprocess.Popen(
            ["ip", "netns", "exec", hosts.names[0], "etcd", *server], stdout=log, stderr=log
        )
    ranks = []
    for n, address in enumerate(hosts.addresses):
        launcher = ["-m", "paddle.distributed.launch", "--nnodes", "1:2", "--nproc_per_node", "1"]
        launcher += ["--master", f"etcd://{hosts.addresses[0]}:2379", "--host", address]
        launcher += ["--sort_ip", "1", "--elastic_level", "1", "--log_dir", f"log-{n}"]
        command = [sys.executable, "-m", "paddle_impl", "train", "run.toml", *words, *saving]
        command += ["--elastic", "--fault", "kill@step=6"]
        env = {"OMP_NUM_THREADS": "1", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
        log_file = tmp_path / f"host-{n}.log"
        ranks.append(hosts.start(n, [*launcher, "--", *command], log_file, env))
    out = tmp_path / "results"
    wait_until(lambda: len(results_in(out)) == 2 and steps_in(out) > 4, ranks[0])
    hosts.kill(1)
    wait_until(lambda: len(results_in(out)) == 3 and steps_in(out) > 2, ranks[0])
    for process in (ranks[0], etcd):
        process.terminate()
        process.wait()
    assert [hosts.processes(n) for n in range(2)] == [[], []]  # no orphan
    first, second, third = results_in(out)
    assert [result.config.replicas for result in (first, second, third)] == [2, 2, 1]
    assert second.resumed_from == str(tmp_path / "saved" / "step-00000004")
    # Rank 0, which was killed in its step 6, has noted its steps, and has written no result.
    noted = sorted(out.glob("*/*/progress.jsonl"))[0].read_text().splitlines()
    assert [step.loss for step in second.steps[:2]] == [json.loads(it)["loss"] for it in noted[4:]]
    assert third.resumed_from is not None
    assert went_on_alone(tmp_path, third, "paddle", words)


def went_on_alone(folder: Path, result: RunResult, framework: str, words: Sequence[str]) -> bool:
    """Whether one process has the same losses from the same checkpoint."""
    command = ["-m", "common.cli", "train", "--config", "run.toml", *words, "--out", "alone"]
    command += ["--framework", framework, "--resume", str(result.resumed_from)]
    alone = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: list(folder.glob("alone/*/checkpoints/step-*")), alone)
    alone.terminate()
    alone.wait()
    (again,) = results_in(folder / "alone")
    pairs = zip(result.steps, again.steps, strict=False)
    return all((ours.step, ours.loss) == (theirs.step, theirs.loss) for ours, theirs in pairs)


def test_a_hang_in_which_every_process_is_alive(hosts: Hosts, tmp_path: Path) -> None:
    words = ["--fault", "hang@device=1,step=1,action=BW1", "--hang-timeout", "20"]
    ranks = [by_tf_config(hosts, n, tmp_path, 7500, *words) for n in range(2)]
    found = [end_of(rank, tmp_path / f"host-{n}-7500.log") for n, rank in enumerate(ranks)]
    line = (
        "no progress for 20 s (--hang-timeout): device 1 hangs in BW1, step 1; "
        "device 0 waits for the gradient of micro-batch 1"
    )
    for n, (status, lines) in enumerate(found):
        assert status == 1 and lines[0].startswith(f"rank {n} ({hosts.addresses[n]}): {line}"), (
            found
        )
    (result,) = results_in(tmp_path / "results")
    assert result.status == "failed" and result.reason.startswith(line)
    (log,) = (tmp_path / "results").glob(f"*/{result.log}")
    assert "(most recent call first)" in log.read_text()  # where each thread stood


def test_a_network_that_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    """For a moment: the run goes on. For longer: both sides have ended, and once it is healed the
    launcher's new processes go on from the last checkpoint. A launcher that is ended ends the run.
    """
    words = [*FOR_EVER, "--out", "cut", "--save-dir", "saved", "--save-every", "1"]
    ranks = [
        torchrun(hosts, n, tmp_path, *words, "--resume", "latest", restarts=1) for n in range(2)
    ]
    out = tmp_path / "cut"
    wait_until(lambda: steps_in(out), ranks[0])
    with hosts.without(1):
        time.sleep(3)
    before = steps_in(out)
    wait_until(lambda: steps_in(out) > before + 1, ranks[0])
    logs = [tmp_path / f"host-{n}.log" for n in range(2)]
    with hosts.without(1):
        for log in logs:
            wait_until(lambda log=log: said_in(log), ranks[0])  # type: ignore[misc]
    lost = f"rank 0 (10.77.0.1): lost rank 1 (10.77.0.2): no sign of life for {LOST_SECONDS:g} s"
    assert said_in(logs[0]) == [lost]
    (second,) = said_in(logs[1])
    assert "the store of the run" in second
    wait_until(lambda: len(results_in(out)) == 2 and steps_in(out) > 1, ranks[0])
    for rank in ranks:
        rank.terminate()
    assert all(rank.wait() for rank in ranks)
    assert [hosts.processes(n) for n in range(2)] == [[], []]
    first, again = results_in(out)
    assert first.status == again.status == "failed"
    assert lost.endswith(first.reason) and again.reason == "ended by SIGTERM"
    assert again.resumed_from == str(tmp_path / "saved" / f"step-{first.steps[-1].step + 1:08}")


@needs_a_compiler
def test_a_slow_link_is_not_taken_for_a_dead_one(hosts: Hosts, tmp_path: Path) -> None:
    """Each message a tenth of a second late, over 1 Mbit/s."""
    with slow_link(hosts, Link(100, 1), tmp_path):
        words = ["--steps", "2", "--out", "slow"]
        ranks = [
            by_tf_config(hosts, n, tmp_path, 7200, *words, network="10.78.0") for n in range(2)
        ]
        found = [end_of(rank, tmp_path / f"host-{n}-7200.log") for n, rank in enumerate(ranks)]
    assert found == [(0, []), (0, [])]
    assert [result.status for result in results_in(tmp_path / "slow")] == ["ok"]


def test_hosts_that_differ_say_who_and_in_what(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 400)
    (tmp_path / "b.txt").write_text("The quick brown dog. " * 400)
    cases = [
        (["--seed", "1"], ["--seed", "2"], "rank 1 (10.77.0.2) has seed = 2; expected 1, as rank"),
        (["--corpus", "a.txt"], ["--corpus", "b.txt"], "rank 1 (10.77.0.2) has corpus = "),
        ([], ["--corpus", "c.txt"], "rank 1 (10.77.0.2): --corpus: corpus c.txt: No such"),
        (["--stages", "3"], ["--stages", "3"], "stages x replicas = 3 x 1 takes 3 processes, the"),
        (["--resume", "latest"], [], "--resume latest: of which run?"),
        ([], [], "rank 1 (10.77.0.2) has framework = {'torch': '9.9.9'}; expected {'torch': "),
        ([], [], "rank 1 (10.77.0.2) has commit = unknown (and 1 more); expected "),
    ]
    # The last two: another version of the framework, and a source that has changed.
    upgraded, changed = tmp_path / "upgraded" / "torch", tmp_path / "changed"
    upgraded.mkdir(parents=True)
    (upgraded / "__init__.py").write_text("")
    (upgraded / "version.py").write_text("__version__ = '9.9.9'\n")
    for package in ("common", "torch_impl"):
        shutil.copytree(ROOT / package, changed / package)
    with (changed / "torch_impl" / "layers.py").open("a") as file:
        file.write("\n")
    own = [str(ROOT)] * (len(cases) - 2)
    seconds = [*own, f"{upgraded.parent}{os.pathsep}{ROOT}", str(changed)]
    ranks = [
        [
            by_tf_config(hosts, n, tmp_path, port, *words, project=project)
            for n, (words, project) in enumerate(zip(case[:2], (str(ROOT), second), strict=True))
        ]
        for port, (case, second) in enumerate(zip(cases, seconds, strict=True), start=5000)
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
