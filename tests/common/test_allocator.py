"""Memory that a step or a job has freed is there for the next one."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from common.runtime.job import Job, JobFile
from common.runtime.worker import run_jobs
from common.spec.run import RunConfig

STEPS = """
import resource, sys, threading
import numpy as np
from common.runtime.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()


def hold(mib):
    return [np.ones(mib * 2**17) for _ in range(192 // mib)]


def step():
    held = [hold(mib) for mib in (2, 48, 96)]  # a tensor may be larger than a thread's heap, 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del held
    held = [hold(mib) for mib in (2, 48, 96)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


thread = threading.Thread(target=step)  # a stage computes in a thread, whose heaps are its own
thread.start()
thread.join()
"""


def page_faults(how: str, **variables: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", STEPS, how]
    return int(subprocess.check_output(command, env=plain | variables, text=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_second_step_touches_no_new_page() -> None:
    assert page_faults("given back") > 10_000
    assert page_faults("kept") < 1_000
    assert page_faults("kept", MALLOC_TOP_PAD_="0") > 10_000  # the user's own setting counts


def test_a_jobs_engine_is_gone_when_the_next_begins(tmp_path: Path) -> None:
    class Engine:
        def __init__(self) -> None:
            self.ring = self

    alive = weakref.WeakSet[Engine]()

    def run(job: Job, build_engine: Any) -> None:
        assert not alive
        alive.add(build_engine(job.config))

    job = Job(config=RunConfig(), out=str(tmp_path))
    gc.disable()
    try:
        status = run_jobs(JobFile(jobs=(job, job)), lambda config: Engine(), run=run)  # type: ignore[arg-type,return-value]
    finally:
        gc.enable()
    assert status == 0
