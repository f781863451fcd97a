"""The NVIDIA GPUs of this machine, as its driver says; asks no framework."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)


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
    used = min(stages, gpus)
    return [stage * used // stages for stage in range(stages)]


def fell_back(device: str, environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of a run's `environment` that says why a CPU computed what was left to choose
    from it and the GPUs there.

    `environment` is what the framework has said of itself.
    """
    gpus = visible_gpus() if device == "auto" and environment.get("device_kind") == "cpu" else ()
    if not gpus:
        return {}
    why = (
        f"sees no GPU though the driver {gpus[0].driver} has {len(gpus)}; `triptych doctor` "
        "says more"
    )
    return {"fell_back": f"{environment.get('framework')} {environment.get('version')} {why}"}


def _chosen(said: str, wanted: str | None) -> tuple[Gpu, ...]:
    """As CUDA reads the variable: indices or the beginnings of UUIDs, up to the first that is
    neither.
    """
    cards = [
        [cell.strip() for cell in line.split(",")]
        for line in said.splitlines()
        if line.count(",") == 4
    ]
    rows = {
        index: (uuid, Gpu(name, _mebibytes(memory), driver))
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


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdecimal() else 0
