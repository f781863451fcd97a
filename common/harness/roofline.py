"""Start the kernel measurements of `common.runtime.roofline` in turns, and collect the results.

Whatever else the machine does then affects all frameworks alike.
"""

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

MODULE = "common.runtime.roofline"
"""The machine itself: NumPy on one thread."""


@dataclass(frozen=True)
class Measured:
    """What one child said."""

    environment: Mapping[str, Any]
    seconds: Mapping[str, float]
    """By kernel: the median over the rounds. Empty where there is an error."""
    error: str = ""


def measure(
    runs: Mapping[str, RunConfig],
    rounds: int,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> dict[str, Measured]:
    """Measure the kernels of runs by name, and those of "machine", each in a worker process of its
    own, in turns, `rounds` times.
    """
    found: dict[str, Measured] = {}
    children: dict[str, subprocess.Popen[str]] = {}
    seen: dict[str, list[Mapping[str, float]]] = {}
    try:
        children["machine"] = _start(MODULE, next(iter(runs.values())), sys.executable)
        for name, config in runs.items():
            implementation = implementations[config.framework]
            missing = why_missing(implementation, python=config.python)
            if missing:
                found[name] = Measured({}, {}, missing)
                continue
            module = f"{implementation.module}.roofline"
            children[name] = _start(module, config, interpreter(module, config.python))
        # All have started and imported at the same time; only now does one wait for the other.
        for name, child in list(children.items()):
            said = _read(child)
            found[name] = Measured(said.get("environment", {}), {}, str(said.get("error", "")))
            if found[name].error:
                children.pop(name).wait()
        for _ in range(rounds):
            for name, child in children.items():
                if found[name].error:
                    continue
                said = _ask(child)
                if "error" in said:
                    found[name] = Measured({}, {}, said["error"])
                else:
                    seen.setdefault(name, []).append(said)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    for name, each in seen.items():
        if not found[name].error:
            medians = {kernel: statistics.median(one[kernel] for one in each) for kernel in each[0]}
            found[name] = Measured(found[name].environment, medians)
    return found


def _start(module: str, config: RunConfig, python: str) -> subprocess.Popen[str]:
    """The worker process, with one thread for whatever library it loads."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return subprocess.Popen(
        worker_command(module, config.model_dump_json(), python=python),
        env=worker_environment(module, python) | single,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _ask(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdin is not None
    try:
        child.stdin.write("\n")
        child.stdin.flush()
    except BrokenPipeError:
        return {"error": "its process has ended"}
    return _read(child)


def _read(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next answer; other output of a framework is no JSON object and is skipped."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"error": f"its process has ended (status {child.wait()})"}
