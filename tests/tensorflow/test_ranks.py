"""Stages and replicas as processes. Each test starts the ranks once, for all of its jobs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from common.checkpoint.directory import folder_name
from common.harness.probes import Run, read_probe
from common.runtime.executor import Message
from common.runtime.job import Job, JobFile, Saving
from common.runtime.worker import run_jobs
from common.runtime.world import World
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from tests.engines import Make, small
from tests.parity.ladder import first_different_bits
from tests.tensorflow.ranks import TOKENS
from tf_impl import ranks
from tf_impl.engine import build_engine
from tf_impl.links import LinkedChannel, Links

RANKS = (0, 1)
"""Of the two stages of `linked`."""
BATCH = {"batch_size": 7, "micro_batches": 3, "steps": 2}


def make_job(config: RunConfig, out: Path, **options: Any) -> Job:
    job = Job(config=config, out=str(out), **{"kind": "probe", "noise": 0.1} | options)
    for folder in job.folders:
        folder.mkdir(parents=True)
    return job


def run_on_ranks(jobs: Sequence[Job], folder: Path) -> None:
    """In a process of its own, since ranks are forked from one whose TensorFlow has not started."""
    JobFile(jobs=tuple(jobs)).write(folder / "jobs.json")
    code = (
        "import sys; from common.runtime.job import JobFile; from tf_impl import ranks;"
        "sys.exit(ranks.run_on_ranks(JobFile.read(sys.argv[1]).jobs))"
    )
    command = [sys.executable, "-c", code, str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def linked() -> list[Links]:
    """Both ends of what two stages talk over, in this process."""
    ports, both = [0, 0], threading.Barrier(2)

    def end(own: int) -> Links:
        def ports_of(port: int) -> list[int]:
            ports[own] = port
            both.wait()
            return ports

        return Links(own, [1 - own], ["127.0.0.1"] * 2, ports_of, Mesh(2, 1).name)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(end, range(2)))


def read(job: Job) -> Run:
    return read_probe(Path(job.out))


def test_stages_that_are_processes_give_the_bits_of_threads(tmp_path: Path) -> None:
    """Among them: a vee, whose tied head is beside the embedding, recomputation, bfloat16."""
    vee = {"chunks": 2, "recompute": "every-1"}
    runs = {
        "1f1b": small("tensorflow", 2, "1f1b", "float64", BATCH, tied_head=True, dropout=0.1),
        "zb-v": small("tensorflow", 2, "zb-v", "bfloat16", BATCH, vee, tied_head=True),
    }
    there = [make_job(config, tmp_path / "processes" / name) for name, config in runs.items()]
    here = [make_job(config, tmp_path / "threads" / name) for name, config in runs.items()]
    run_on_ranks(there, tmp_path)
    assert run_jobs(JobFile(jobs=tuple(here)), build_engine) == 0
    for a, b in zip(there, here, strict=True):
        assert len(read(a).parts) == 2
        assert first_different_bits(read(a), read(b)) is None, a.out
        assert read(a).held_out_loss == read(b).held_out_loss


def test_replicas_in_every_kind_of_job(tmp_path: Path) -> None:
    """A sum that overlaps with the pipeline gives the bits of one behind it, a run that goes on
    from a checkpoint those of one that was not interrupted.
    """

    def config(replicas: int = 2, reduce: str = "overlap") -> RunConfig:
        run = {"chunks": 2, "reduce": reduce, "replicas": replicas, "threads": 4}
        even = BATCH | {"batch_size": 12}  # pieces of one size: those of two are traced twice
        return small("tensorflow", 2, "zb-v", train=even, run=run, dropout=0.1)

    folder = tmp_path / "checkpoints"
    saving = Saving(directory=str(folder), every=1, keep=2, token="t")
    after = {steps: {"resume": str(folder / folder_name(steps))} for steps in (1, 2)}
    loss = {"kind": "evaluate", "batches": 2} | after[2]
    jobs = {
        "overlap": make_job(config(), tmp_path / "overlap", saving=saving),
        "flush": make_job(config(reduce="flush"), tmp_path / "flush"),
        "resumed": make_job(config(), tmp_path / "resumed", kind="train", **after[1]),
        "loss": make_job(config(), tmp_path / "loss", **loss),
    }
    run_on_ranks(list(jobs.values()), tmp_path)
    assert first_different_bits(read(jobs["overlap"]), read(jobs["flush"])) is None
    straight, resumed = (read(jobs[name]).parts[0] for name in ("overlap", "resumed"))
    for name in ("loss", "gradient_norm"):
        assert getattr(straight.steps[1], name) == getattr(resumed.steps[0], name)
    assert straight.held_out_loss == resumed.held_out_loss
    alone = make_job(config(1), tmp_path / "loss-alone", **loss)
    assert run_jobs(JobFile(jobs=(alone,)), build_engine) == 0
    mine, theirs = (
        json.loads((Path(job.out) / "evaluation.json").read_text())["loss"]
        for job in (jobs["loss"], alone)
    )
    assert math.isclose(mine, theirs, rel_tol=1e-6)


def test_every_rank_predicts_what_threads_do(tmp_path: Path, make: Make) -> None:
    subprocess.run([sys.executable, "-m", "tests.tensorflow.ranks", str(tmp_path)], check=True)
    expected = make(2, "zb-v", run={"chunks": 2}).predict(TOKENS)
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), expected)


def test_another_number_of_processes_than_the_mesh_has_is_refused() -> None:
    config = small("tensorflow", 2, run={"replicas": 2})
    with pytest.raises(ValueError, match="stages x replicas = 4, but 2 processes were started"):
        ranks._join(World(0, ("127.0.0.1:1", "127.0.0.1:2")), config)


def test_a_rank_sees_one_gpu_of_its_host_for_each_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ("a:1", "a:2", "a:3", "b:1")
    worlds = [World(rank, hosts) for rank in range(4)]
    for listed, shards, expected in (
        (None, 1, ["0", "0", "1", "0"]),
        ("5, 7", 1, ["5", "5", "7", "5"]),
        (None, 2, ["0", "0,1", "1", "0,1"]),
    ):
        assert [ranks._own_gpus(world, shards, 2, listed) for world in worlds] == expected
    monkeypatch.setattr(ranks, "visible_gpus", tuple)
    job = Job(config=small("tensorflow", 2, run={"device": "cuda"}), out="")
    with pytest.raises(ValueError, match="there is no GPU; expected 'cpu' or 'auto'"):
        ranks.run_on_ranks([job])


def test_messages_are_found_by_their_pass_and_address() -> None:
    """In another order than they were sent; and who waits for an ended process is told so."""
    first, second = linked()
    x, y = Message("activation", 0, 1), Message("activation", 1, 1)
    sender, receiver = LinkedChannel(first, 0, RANKS, 7), LinkedChannel(second, 1, RANKS, 7)
    for number, message in enumerate((x, y)):
        sender.send(message, [tf.fill((2, 3), tf.cast(number, tf.bfloat16))], 1)
    LinkedChannel(first, 0, RANKS, 8).send(x, [tf.fill((1,), 8.0)], 1)
    for message, value in ((y, 1), (x, 0)):
        (found,) = receiver.receive(message, 0)
        assert found.dtype == tf.bfloat16 and np.all(found.numpy() == value)
    (later,) = LinkedChannel(second, 1, RANKS, 8).receive(x, 0)
    assert later.numpy().tolist() == [8.0]
    first.close()
    with pytest.raises(ConnectionError, match="stage 0 has ended"):
        receiver.receive(Message("activation", 2, 1), 0)
    with pytest.raises(ConnectionError, match="stage 0 has ended"):
        receiver.check()
