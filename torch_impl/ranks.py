"""One process per stage (`common.runtime.ranks`), as PyTorch joins them. Only its own pipeline (`peer.py`) needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.ranks import Ranks
from common.runtime.ranks import run_on_ranks as run
from common.runtime.worker import Switch
from common.spec import RunConfig


def run_on_ranks(jobs: Sequence[Job], switch: Switch) -> int:
    """Runs the jobs, which share `stages` and `device`, on one process per stage. Returns the exit status."""
    return run(Ranks("torch_impl", _join, _wait_for_all), jobs, switch)


def _join(rank: int, endpoints: Sequence[str], config: RunConfig) -> Callable[[RunConfig], Engine]:
    from torch import distributed

    from torch_impl import devices
    from torch_impl.engine import build_engine

    device = devices.stage_devices(config.stages, config.device)[rank]
    devices.prepare_thread(device, devices.threads_per_stage(config.stages, config.threads))
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"tcp://{endpoints[0]}", rank=rank, world_size=len(endpoints))
    return build_engine


def _wait_for_all(stages: int) -> None:
    from torch import distributed

    distributed.barrier()
