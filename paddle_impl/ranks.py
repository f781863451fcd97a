"""One process per stage, replica and shard (`common.runtime.ranks`), as Paddle joins them.

`paddle.distributed.launch` takes 3 s to start two stages where this takes 1.4 s; over several hosts
it is what starts the ranks.

Differs: PyTorch needs it for its own pipeline and for replicas alone, TensorFlow for replicas:
their stages are threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.ranks import Ranks, mesh_of
from common.runtime.ranks import run_on_ranks as run
from common.runtime.world import World
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from paddle_impl import devices


def run_on_ranks(jobs: Sequence[Job]) -> int:
    """Run the jobs, which share a mesh and `device`, a process a rank. Returns the exit status."""
    from paddle_impl.drift import switch  # after `devices.configure`, since it imports Paddle

    on_cpu = devices.stage_devices(mesh_of(jobs).size, jobs[0].config.device)[0] == "cpu"
    start_method: Literal["fork", "spawn"] = "fork" if on_cpu else "spawn"
    return run(replace(RANKS, start_method=start_method), jobs, switch)


def join_pipeline(world: World, mesh: Mesh, device: str) -> None:
    """Make this process one of `mesh`, by fleet's hybrid groups; ranks may be on other hosts.

    Waits until all have joined. Raises ConnectionError if one of them does not; ValueError if the
    processes are not as many as the mesh has, or some compute on a GPU and others on a CPU.
    """
    if world.size != mesh.size:
        axes = "stages x replicas" + (" x tensor_parallel" if mesh.shards > 1 else "")
        raise ValueError(
            f"{axes} = {mesh.size}, but {world.size} processes were started; expected {mesh.size}"
        )
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.log_util import set_log_level

    from paddle_impl import groups, sockets

    set_log_level("ERROR")
    for harmless in (
        "No shared comm will be constructed",  # any model without a tied head
        "Current(ly not a parallel execution| global rank \\d+ is not in group)",  # d or p = 1
    ):
        warnings.filterwarnings("ignore", message=harmless)

    own = devices.stage_devices(world.local_size, device)[world.local_rank]
    kind, _, index = own.partition(":")
    os.environ.update(
        PADDLE_TRAINER_ID=str(world.rank),
        PADDLE_TRAINERS_NUM=str(world.size),
        PADDLE_TRAINER_ENDPOINTS=",".join(world.endpoints),
        PADDLE_CURRENT_ENDPOINT=world.endpoints[world.rank],
        PADDLE_MASTER=world.endpoints[0],
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # another launcher's, which Paddle would prefer
        os.environ.pop(name, None)
    if kind != "cpu":
        os.environ[f"FLAGS_selected_{kind}s"] = index  # what fleet asks for the GPU of a rank
    joined = groups.joined = groups.Joined(world, mesh, _devices_of_all(world, own))
    if joined.through_host:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        sockets.enable(mesh)
    else:
        os.environ["PADDLE_DISTRI_BACKEND"] = "nccl" if kind == "gpu" else "xccl"
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        # Outermost first, as `common.spec.mesh` numbers the ranks.
        "order": ["pp", "dp", "sharding", "sep", "cp", "mp"],
        "pp_degree": mesh.stages,
        "dp_degree": mesh.replicas,
        "mp_degree": mesh.shards,
        # Fleet would divide each micro-batch's loss by their number; ours is divided by the tokens.
        "pp_configs": {"delay_scale_loss": True},
    }
    fleet.init(is_collective=True, strategy=strategy, log_level="ERROR")
    paddle.set_device(own)  # for the backend gloo, fleet has chosen the CPU
    # On GPUs this makes the communicator of all ranks, which the end of a pass would else wait for.
    _wait_for_all(world.size)


def _join(world: World, config: RunConfig) -> Callable[[RunConfig], Engine]:
    """Make this process a rank of `world`; return `build_engine`. Raises as `join_pipeline`."""
    # A spawned or launched rank knows nothing of a parent's settings.
    devices.configure(world.local_size, config.threads, config.device)
    from paddle_impl.engine import build_engine

    join_pipeline(world, Mesh.of(config), config.device)
    return build_engine


def _devices_of_all(world: World, own: str) -> tuple[str, ...]:
    """What every rank computes on, which only its host can say, by the store of fleet's groups."""
    if world.size == 1:
        return (own,)
    from paddle.base import core

    from paddle_impl import sockets

    sockets.wait_for_store(world)
    store = core.create_or_get_global_tcp_store()
    store.set(f"device/{world.rank}", own)
    found = tuple(bytes(store.get(f"device/{rank}")).decode() for rank in range(world.size))
    if len({name.partition(":")[0] for name in found}) > 1:
        said = ", ".join(map("{} {}".format, world.hosts, found))
        raise ValueError(f"the hosts compute on different devices ({said}); expected one kind")
    return found


def _wait_for_all(size: int) -> None:
    import paddle

    if size > 1:
        everybody = paddle.zeros([1])
        paddle.distributed.all_reduce(everybody)
        everybody.item()  # a GPU has only queued it


RANKS = Ranks("paddle_impl", _join, _wait_for_all)
