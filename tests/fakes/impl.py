"""`python -m tests.fakes.impl JOBS.json`: the oracle in place of a framework, with faults.

The variable FAKE_FAULTS, such as `paddle=hang,tensorflow=crash`, gives a framework a fault; it
happens in step 1.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np

from common.runtime.engine import Arrays
from common.runtime.executor import Event
from common.runtime.job import JobFile
from common.runtime.oracle_worker import OracleEngine
from common.runtime.worker import run_jobs
from common.schedule.generators import make_schedule
from common.spec.data import Batch

SLEEPER = [sys.executable, "-c", "import signal; signal.pause()", os.environ.get("FAKE_MARK", "")]
"""A process that a test can find again by FAKE_MARK."""


class FakeEngine(OracleEngine):
    """The oracle, unless it has a fault."""

    @property
    def fault(self) -> str:
        faults = dict(
            pair.split("=") for pair in os.environ.get("FAKE_FAULTS", "").split(",") if pair
        )
        return faults.get(self.config.framework, "")

    def forward_backward(self, batch: Batch) -> float:
        loss = super().forward_backward(batch)
        if batch.step != 1:
            return loss
        match self.fault:
            case "raise":
                raise ValueError("a fault in step 1")
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "out-of-memory":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                print("SomeError: gave up", flush=True)
                os._exit(3)
            case "hang":
                subprocess.run(SLEEPER)
            case "stubborn":  # ignores SIGTERM, and so does a process that it starts
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                subprocess.run(SLEEPER)
            case "orphan":  # ends well and leaves a process behind
                subprocess.Popen(SLEEPER)
            case "wrong-loss":
                return loss * 1.001
        return loss

    def gradients(self) -> Arrays:
        gradients = super().gradients()
        if self.fault == "wrong-gradient":
            name = "block.0.attention.query.weight"
            gradients[name] = gradients[name].T
        return gradients

    def events(self) -> dict[int, list[Event]]:
        c = self.config
        schedule = make_schedule(c.schedule, c.stages, c.train.micro_batches, c.chunks)
        now = time.perf_counter()
        return {
            device: [
                Event(action, now + i, now + i, now + i + 1) for i, action in enumerate(actions)
            ]
            for device, actions in enumerate(schedule.devices)
        }

    def environment(self) -> dict[str, object]:
        return {
            "framework": self.config.framework,
            "version": "0.0",
            "python": platform.python_version(),
            "device": "cpu",
            "numpy": np.__version__,
        }

    def peak_memory_bytes(self) -> dict[int, int]:
        return dict.fromkeys(self.devices, 100_000_000)


if __name__ == "__main__":
    sys.exit(run_jobs(JobFile.read(sys.argv[1]), FakeEngine))
