"""One process per stage, replica and shard (`common.runtime.ranks`), joined by torch.distributed.

Replicas need it, launchers, and PyTorch's own pipeline (`torch_pipelining.py`). Without them, our
executor runs all stages, and their shards (`shard_threads.py`), as threads of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.io.edges import write_file
from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.launchers import Launched, interface_of
from common.runtime.meeting import Store
from common.runtime.ranks import Ranks, mesh_of
from common.runtime.ranks import run_on_ranks as run
from common.runtime.text_store import TextStore
from common.runtime.worker import Switch
from common.runtime.world import World
from common.spec.rules import why_too_few_gpus
from common.spec.run import RunConfig
from torch_impl import devices


def run_on_ranks(jobs: Sequence[Job], switch: Switch) -> int:
    """Run the jobs, which share a mesh and `device`, a process a rank. Returns the exit status."""
    config = jobs[0].config
    size = mesh_of(jobs).size
    used = devices.stage_devices(size, config.device)
    on_gpus = used[0].type == "cuda"
    if on_gpus and (why := why_too_few_gpus(size, len(set(used)))):
        for job in jobs:
            write_file(Path(job.out) / "failed-0.txt", f"ValueError: {why}\n")
        return 1
    return run(replace(RANKS, start_method="spawn" if on_gpus else "fork"), jobs, switch)


def _join(world: World, config: RunConfig) -> Callable[[RunConfig], Engine]:
    # A spawned rank knows nothing of its parent's settings.
    devices.configure(world.local_size, config.threads, config.device)
    from torch import distributed

    if not hasattr(distributed, "all_gather_single"):  # its name until PyTorch 2.12
        distributed.all_gather_single = distributed.all_gather_into_tensor
    from torch_impl import streams
    from torch_impl.data_parallel import DataParallelEngine
    from torch_impl.engine import build_engine
    from torch_impl.rank_engine import RankEngine
    from torch_impl.torchrun_store import TorchrunStore

    # A host's GPUs are dealt to its processes in turn.
    device = devices.stage_devices(world.local_size, config.device)[world.local_rank]
    streams.prepare_thread(device, threads_per_stage(world.local_size, config.threads))
    backend = "nccl" if device.type == "cuda" else "gloo"
    where: dict[str, Any] = {"init_method": f"tcp://{world.endpoints[0]}"}
    if world.room is not None:
        # Gloo takes the interface of the host's name otherwise.
        interface = interface_of(world.hosts[world.rank])
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if isinstance(world.room.store, TorchrunStore):
            where = {"store": world.room.store.of_run(world.room.run)}
    distributed.init_process_group(backend, **where, rank=world.rank, world_size=world.size)

    def build(config: RunConfig) -> Engine:
        if config.executor == "table":
            return RankEngine(config, world, device)
        if config.executor == "plain" and config.tensor_parallel > 1:
            from torch_impl.tensor_parallel import TensorParallelEngine  # DTensor's import is slow

            return TensorParallelEngine(config, world, device)
        if config.executor == "plain":
            return DataParallelEngine(config, world, device)
        return build_engine(config)

    return build


def _wait_for_all(stages: int) -> None:
    from torch import distributed

    distributed.barrier()


def _connect(launched: Launched, seconds: float) -> Store:
    if not launched.has_store:
        return TextStore(launched, seconds)
    from torch_impl.torchrun_store import TorchrunStore

    return TorchrunStore(launched, seconds)


RANKS = Ranks("torch_impl", _join, _wait_for_all, connect=_connect)
