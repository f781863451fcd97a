"""A parent that is killed outright, so that it can end nothing itself, leaves no worker behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.runtime.job import Job, JobFile
from common.spec.run import RunConfig
from tests.waiting import wait_for_end

PARENT = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and a shell that ignores and blocks what a worker is to end by
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
worker = subprocess.Popen([sys.executable, "-m", sys.argv[1], sys.argv[2]], start_new_session=True)
print(worker.pid, flush=True)
sys.stdin.read()
"""  # noqa: E501


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
@pytest.mark.parametrize("module", ["common.runtime.oracle_worker", "torch_impl", "paddle_impl"])
def test_a_killed_parent_leaves_no_process(module: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"train": {"steps": 1_000_000}, "device": "cpu"})
    JobFile(jobs=(Job(config=config, out=str(tmp_path)),)).write(tmp_path / "jobs.json")
    command = [sys.executable, "-c", PARENT, module, str(tmp_path / "jobs.json")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        while not (tmp_path / "progress.jsonl").exists():
            assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.1)
        family = [worker, *worker.children(recursive=True)]
        parent.kill()
        wait_for_end(family)
