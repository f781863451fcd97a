"""One process per stage (`common.runtime.ranks`), as PyTorch joins them.

Only its own pipeline (`torch_pipelining.py`) needs it.

Differs: TensorFlow runs stages as threads only, and so does our own executor with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.io.edges import write_file
from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.ranks import Ranks
from common.runtime.ranks import run_on_ranks as run
from common.runtime.worker import Switch
from common.runtime.world import World
from common.spec.rules import why_too_few_gpus
from common.spec.run import RunConfig
from torch_impl import devices


def run_on_ranks(jobs: Sequence[Job], switch: Switch) -> int:
    """Run the jobs, which share `stages` and `device`, on one process per stage. Returns the exit
    status.
    """
    config = jobs[0].config
    used = devices.stage_devices(config.stages, config.device)
    on_gpus = used[0].type == "cuda"
    if on_gpus and (why := why_too_few_gpus(config.stages, len(set(used)))):
        for job in jobs:
            write_file(Path(job.out) / "failed-0.txt", f"ValueError: executor = native: {why}\n")
        return 1
    return run(
        Ranks("torch_impl", _join, _wait_for_all, "spawn" if on_gpus else "fork"), jobs, switch
    )


def _join(world: World, config: RunConfig) -> Callable[[RunConfig], Engine]:
    devices.configure(
        config.stages, config.threads, config.device
    )  # a spawned rank knows nothing of its parent's
    from torch import distributed

    from torch_impl import streams
    from torch_impl.engine import build_engine

    device = devices.stage_devices(config.stages, config.device)[world.rank]
    streams.prepare_thread(device, threads_per_stage(config.stages, config.threads))
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{world.endpoints[0]}",
        rank=world.rank,
        world_size=world.size,
    )
    return build_engine


def _wait_for_all(stages: int) -> None:
    from torch import distributed

    distributed.barrier()
