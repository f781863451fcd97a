"""Measure the matrix products that a run's devices could do at most, in a process of its own.

NumPy measures a CPU, for all frameworks alike, with as many threads as the run has. Cards, and
bfloat16, are measured by PyTorch.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.harness.interpreters import interpreter, worker_command, worker_environment
from common.report.result import Peak, cards_of
from common.runtime.cpus import threads_per_stage, usable_cpus
from common.spec.efficiency import published_flops_per_second
from common.spec.run import RunConfig

PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Probe:
    """What is to be measured; runs with the same one share its answer."""

    dtype: str
    threads: int
    device: str
    """cpu or cuda."""
    python: str | None = None
    """PyTorch's interpreter, where the user has named one and PyTorch multiplies."""

    @property
    def module(self) -> str:
        """What multiplies."""
        needs_torch = self.device == "cuda" or self.dtype == "bfloat16"
        return "torch_impl.matmul_peak" if needs_torch else "common.runtime.matmul_peak"

    @classmethod
    def of_run(cls, config: RunConfig, environment: Mapping[str, Any]) -> Probe | None:
        """Return that of a run; None where its worker named neither a CPU nor an NVIDIA card."""
        kind = str(environment.get("device_kind"))
        if kind != "cpu" and "cuda" not in kind:
            return None
        # As many as all stages have: 7 for 2 stages are 3 each, so 6.
        threads = config.stages * threads_per_stage(config.stages, config.threads)
        device = "cpu" if kind == "cpu" else "cuda"
        probe = cls(config.train.dtype, min(threads, usable_cpus()), device)
        takes_its_own = config.framework == "torch" and probe.module.startswith("torch_impl")
        return replace(probe, python=config.python) if takes_its_own else probe

    def measure(self) -> tuple[float | None, str]:
        """Return the FLOP/s of one card, or of the CPU's threads together, and what multiplied;
        None where that could not be measured.
        """
        arguments = [self.dtype, str(self.threads)]
        if self.module.startswith("torch_impl"):
            arguments.append(self.device)
        python = interpreter(self.module, self.python)
        try:
            said = subprocess.run(
                worker_command(self.module, *arguments, python=python),
                env=worker_environment(self.module, python),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=True,
            ).stdout
            answer = json.loads(said.splitlines()[-1])
            return float(answer["flops_per_second"]), str(answer["by"])
        except (OSError, ValueError, LookupError, subprocess.SubprocessError):
            return None, ""


def peak_of(
    probe: Probe, measured: tuple[float | None, str], environment: Mapping[str, Any]
) -> Peak:
    """Return the peak of all devices of a run together: its cards, or the CPU."""
    rate, by = measured
    if probe.device == "cpu":
        words = f"{by}, {probe.dtype}, {probe.threads} threads" if by else ""
        return Peak(measured_flops_per_second=rate, measured_by=words)
    names, cards = cards_of(environment)
    one = published_flops_per_second(names[0], probe.dtype) if len(names) == 1 else None
    return Peak(
        measured_flops_per_second=rate and rate * cards,
        published_flops_per_second=one and one * cards,
        measured_by=f"{by}, {probe.dtype}, one card" if by else "",
    )
