"""Our executor beside fleet's own, over the processes that `python -m paddle_impl` starts; and how
these end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from paddle.distributed.fleet.meta_parallel import PipelineParallel
from safetensors.numpy import load_file

from common.runtime.job import Job, JobFile, Part
from common.schedule.generators import make_schedule
from common.spec.run import RunConfig
from tests.engines import Make, small
from tests.waiting import wait_for_end, wait_until

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 1), (2, 4), (3, 5), (4, 2), (4, 8)])
def test_fleets_own_schedule_is_our_1f1b(make: Make, p: int, m: int) -> None:
    pipeline = make(1, run={"executor": "native"}).pipeline
    for stage, row in enumerate(make_schedule("1f1b", p, m).devices):
        pipeline.num_stages, pipeline.stage_id, pipeline.accumulate_steps = p, stage, m
        theirs = PipelineParallel.forward_backward_pipeline(pipeline, None, static_scheduler=True)
        assert theirs == "".join(f"{action};" for action in row).lower().replace("bw", "b")


def start(folder: Path, *configs: RunConfig) -> subprocess.Popen[str]:
    """Starts `python -m paddle_impl` over the jobs, whose folders are `folder`/0, 1, ..."""
    outs = [folder / str(index) for index in range(len(configs))]
    for out in outs:
        out.mkdir(exist_ok=True)
    jobs = tuple(
        Job(config=config, out=str(out)) for config, out in zip(configs, outs, strict=True)
    )
    JobFile(jobs=jobs).write(folder / "jobs.json")
    command = [sys.executable, "-m", "paddle_impl", str(folder / "jobs.json")]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_training(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that is far from its end, once it has begun; and its two ranks."""
    worker = start(folder, small("paddle", 2, train={"steps": 1_000_000}))
    wait_until((folder / "0" / "progress.jsonl").exists, worker)
    ranks = psutil.Process(worker.pid).children()
    assert len(ranks) == 2
    return worker, ranks


def test_fleets_own_pipeline_and_our_executor_give_the_same_bits(tmp_path: Path) -> None:
    options = {"dtype": "float64", "tied_head": True, "dropout": 0.1}
    worker = start(
        tmp_path, *(small("paddle", 2, run={"executor": e}, **options) for e in ("native", "table"))
    )
    log, _ = worker.communicate()
    assert worker.returncode == 0, log
    planned = [list(map(str, row)) for row in make_schedule("1f1b", 2, 4).devices]
    for rank in range(2):
        table, native = (
            Part.model_validate_json((tmp_path / f"{i}/part-{rank}.json").read_text())
            for i in (1, 0)
        )
        assert [(s.loss, s.gradient_norm) for s in table.steps] == [
            (s.loss, s.gradient_norm) for s in native.steps
        ]
        for part in (table, native):
            assert [event.action for event in part.steps[-1].events[rank]] == planned[rank]
        ours, theirs = (load_file(tmp_path / f"{i}/part-{rank}.safetensors") for i in (1, 0))
        assert ours.keys() == theirs.keys() and ours
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], name)


def test_a_killed_rank_ends_the_run_and_says_so(tmp_path: Path) -> None:
    worker, ranks = start_training(tmp_path)
    ranks[1].kill()
    log, _ = worker.communicate()
    assert worker.returncode == 1 and not list(tmp_path.glob("0/part-*"))
    assert not any(process.is_running() for process in ranks)
    assert log.splitlines()[-1] == "paddle_impl: stage 1 was ended by SIGKILL"
    told = {path.name: path.read_text().splitlines()[-1] for path in tmp_path.glob("0/failed-*")}
    assert told["failed-1.txt"] == "stage 1 was ended by SIGKILL"
    assert "stage 1 has ended" in told["failed-0.txt"]


def test_a_killed_rank_of_a_replica_is_named(tmp_path: Path) -> None:
    config = small("paddle", 2, train={"steps": 1_000_000}, run={"replicas": 2, "threads": 4})
    for replica in range(2):
        Job(config=config, out=str(tmp_path / "0")).folders[replica].mkdir(parents=True)
    child = start(tmp_path, config)
    wait_until((tmp_path / "0" / "progress.jsonl").exists, child)
    ranks = psutil.Process(child.pid).children()
    assert len(ranks) == 4
    ranks[3].kill()  # the last in the mesh
    log, _ = child.communicate()
    assert child.returncode == 1
    assert log.splitlines()[-1] == "paddle_impl: stage 1 of replica 1 was ended by SIGKILL"
    told = [path.read_text().splitlines()[-1] for path in tmp_path.rglob("failed-*")]
    assert "stage 1 of replica 1 was ended by SIGKILL" in told
    assert any("stage 1 of replica 1 has ended" in line for line in told), told
    assert not any(process.is_running() for process in ranks)


def test_no_rank_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    worker, ranks = start_training(tmp_path)
    worker.kill()
    worker.communicate()
    wait_for_end(ranks)


def test_a_job_that_fails_on_one_rank_ends_on_all_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "0" / "part-1.json").mkdir(parents=True)  # rank 1 cannot write its result
    worker = start(tmp_path, small("paddle", 2), small("paddle", 2))
    worker.communicate()
    assert worker.returncode == 1
    reason = (tmp_path / "0" / "failed-1.txt").read_text().splitlines()[-1]
    assert reason.startswith("IsADirectoryError")
    assert sorted(path.name for path in tmp_path.glob("1/part-*.json")) == [
        "part-0.json",
        "part-1.json",
    ]
