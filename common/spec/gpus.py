"""The NVIDIA GPUs of this machine, as its driver says; asks no framework."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)

LEAST_DRIVERS = {"13": 580, "12": 525, "11": 450}
"""By CUDA's major version: the oldest branch of drivers that runs it (NVIDIA, CUDA Compatibility,
Minor Version Compatibility, table 1)."""


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    memory_bytes: int
    driver: str


@cache
def visible_gpus() -> tuple[Gpu, ...]:
    """Return those that CUDA_VISIBLE_DEVICES leaves, in its order; none where no driver answers."""
    try:
        said = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return _chosen(said, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpus_of_stages(stages: int, gpus: int) -> list[int]:
    """Return each stage's GPU: one of its own, or shared by neighbours where there are fewer."""
    # 5 stages on 2 GPUs: 0 0 0 1 1. Neighbours share one, so a message between them stays on it.
    used = min(stages, gpus)
    return [stage * used // stages for stage in range(stages)]


def why_no_gpu(cuda: str, gpus: Sequence[Gpu]) -> str | None:
    """Return why a framework that was built for this CUDA cannot use these GPUs, and what to do.

    None if nothing speaks against it. `cuda` is empty for a CPU build.
    """
    if not gpus:
        return "no NVIDIA driver shows a GPU"
    if not cuda:
        return "it is a CPU build; expected one for CUDA (make install GPU=1)"
    least, driver = LEAST_DRIVERS.get(cuda.partition(".")[0], 0), gpus[0].driver
    if driver.partition(".")[0].isdecimal() and int(driver.partition(".")[0]) < least:
        return f"the driver {driver} is too old for CUDA {cuda}; expected {least} or later"
    return None


def fell_back(device: str, environment: Mapping[str, Any], cuda: str) -> dict[str, str]:
    """Return the part of a run's `environment` that says why a CPU computed what was left to choose
    from it and the GPUs there.

    `environment` is what the framework has said of itself, `cuda` what it was built for.
    """
    gpus = visible_gpus() if device == "auto" and environment.get("device_kind") == "cpu" else ()
    if not gpus:
        return {}
    fits = f"CUDA {cuda} and the driver {gpus[0].driver} fit, its libraries may not be there"
    why = why_no_gpu(cuda, gpus) or f"{fits}; `triptych doctor` says more"
    name = f"{environment.get('framework')} {environment.get('version')}"
    return {"fell_back": f"{name} uses none of {counted(gpus)}: {why}"}


def counted(gpus: Sequence[Gpu]) -> str:
    """Return `1 GPU` or `2 GPUs`."""
    return f"{len(gpus)} GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"


def _chosen(said: str, wanted: str | None) -> tuple[Gpu, ...]:
    """As CUDA reads the variable: indices or beginnings of UUIDs, up to the first wrong one."""
    # nvidia-smi's lines are index, uuid, name, memory in MiB and driver; a warning is no such line.
    cards = [
        [cell.strip() for cell in line.split(",")]
        for line in said.splitlines()
        if line.count(",") == 4
    ]
    rows = {
        index: (uuid, Gpu(name, int(memory) * 2**20 if memory.isdecimal() else 0, driver))
        for index, uuid, name, memory, driver in cards
    }
    if wanted is None:
        return tuple(gpu for _, gpu in rows.values())
    chosen = []
    for word in map(str.strip, wanted.split(",")):
        found = [
            gpu
            for index, (uuid, gpu) in rows.items()
            if word and (word == index or uuid.startswith(word))
        ]
        if not found:
            break
        chosen.append(found[0])
    return tuple(chosen)
