"""Kernel measurements (`common.runtime.kernels`) in turns, so that a busy machine is fair."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.harness.interpreters import interpreter, worker_command, worker_environment
from common.harness.launch import IMPLEMENTATIONS, Implementation, why_missing
from common.spec.run import RunConfig

MODULE = "common.runtime.kernels"
"""The machine itself: NumPy on one thread."""


@dataclass(frozen=True)
class Measured:
    """What one worker said."""

    environment: Mapping[str, Any]
    seconds: Mapping[str, float]
    """By kernel: the median over the rounds. Empty where there is an error."""
    error: str = ""


def measure(
    runs: Mapping[str, RunConfig],
    rounds: int,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> dict[str, Measured]:
    """Measure the kernels of runs, and of "machine", by turns, each in a process of its own."""
    found: dict[str, Measured] = {}
    workers: dict[str, subprocess.Popen[str]] = {}
    seen: dict[str, list[Mapping[str, float]]] = {}
    try:
        workers["machine"] = _start(MODULE, next(iter(runs.values())), sys.executable)
        for name, config in runs.items():
            implementation = implementations[config.framework]
            missing = why_missing(implementation, python=config.python)
            if missing:
                found[name] = Measured({}, {}, missing)
                continue
            module = f"{implementation.module}.roofline"
            workers[name] = _start(module, config, interpreter(module, config.python))
        # All have started and imported at the same time; only now does one wait for the other.
        for name, worker in list(workers.items()):
            said = _read(worker)
            found[name] = Measured(said.get("environment", {}), {}, str(said.get("error", "")))
            if found[name].error:
                workers.pop(name).wait()
        for _ in range(rounds):
            for name, worker in workers.items():
                if found[name].error:
                    continue
                said = _ask(worker)
                if "error" in said:
                    found[name] = Measured({}, {}, said["error"])
                else:
                    seen.setdefault(name, []).append(said)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    for name, each in seen.items():
        if not found[name].error:
            medians = {kernel: statistics.median(one[kernel] for one in each) for kernel in each[0]}
            found[name] = Measured(found[name].environment, medians)
    return found


def _start(module: str, config: RunConfig, python: str) -> subprocess.Popen[str]:
    """The worker process, with one thread for whatever library it loads."""
    # One thread each, whichever of these libraries it has: kernels are compared, not schedulers.
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return subprocess.Popen(
        worker_command(module, config.model_dump_json(), python=python),
        env=worker_environment(module, python) | single,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin is not None
    try:
        worker.stdin.write("\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return {"error": "its process has ended"}
    return _read(worker)


def _read(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next answer; other output of a framework is no JSON object and is skipped."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"error": f"its process has ended (status {worker.wait()})"}
