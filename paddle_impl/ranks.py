"""One process per stage (`common.runtime.ranks`), as Paddle joins them.

`paddle.distributed.launch` takes 3 s to start two stages where this takes 1.4 s.

Differs: PyTorch needs it for its own pipeline alone, TensorFlow for nothing: their stages are
threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.ranks import Ranks
from common.runtime.ranks import run_on_ranks as run
from common.runtime.world import World
from common.spec.run import RunConfig
from paddle_impl import devices


def run_on_ranks(jobs: Sequence[Job]) -> int:
    """Run the jobs, which share `stages` and `device`, on one process per stage. Returns the exit
    status.
    """
    from paddle_impl.drift import switch  # after `devices.configure`, since it imports Paddle

    config = jobs[0].config
    on_cpu = devices.stage_devices(config.stages, config.device)[0] == "cpu"
    start_method: Literal["fork", "spawn"] = "fork" if on_cpu else "spawn"
    return run(Ranks("paddle_impl", _join, _wait_for_all, start_method), jobs, switch)


def join_pipeline(rank: int, endpoints: Sequence[str], device: str) -> None:
    """Make this process stage `rank` of a pipeline whose processes listen at `endpoints`
    (host:port).

    Waits until all have joined. Raises ConnectionError if one of them does not.
    """
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.log_util import set_log_level

    from paddle_impl import groups, sockets

    set_log_level("ERROR")
    warnings.filterwarnings(
        "ignore", message="No shared comm will be constructed"
    )  # any model without a tied head
    if len(endpoints) == 1:
        warnings.filterwarnings(
            "ignore", message="Current(ly not a parallel execution| global rank 0 is not in group)"
        )

    used = devices.stage_devices(len(endpoints), device)
    kind, _, index = used[rank].partition(":")
    os.environ.update(
        PADDLE_TRAINER_ID=str(rank),
        PADDLE_TRAINERS_NUM=str(len(endpoints)),
        PADDLE_TRAINER_ENDPOINTS=",".join(endpoints),
        PADDLE_CURRENT_ENDPOINT=endpoints[rank],
        PADDLE_MASTER=endpoints[0],
    )
    if kind != "cpu":
        os.environ[f"FLAGS_selected_{kind}s"] = index  # what fleet asks for the GPU of a rank
    if groups.through_host(used):
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        sockets.enable()
    else:
        os.environ["PADDLE_DISTRI_BACKEND"] = "nccl" if kind == "gpu" else "xccl"
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": 1,
        "mp_degree": 1,
        "pp_degree": len(endpoints),
        # Fleet would divide every micro-batch's loss by their number; ours is divided by the tokens
        # already.
        "pp_configs": {"delay_scale_loss": True},
    }
    fleet.init(is_collective=True, strategy=strategy, log_level="ERROR")
    paddle.set_device(used[rank])  # for the backend gloo, fleet has chosen the CPU


def _join(world: World, config: RunConfig) -> Callable[[RunConfig], Engine]:
    devices.configure(
        config.stages, config.threads, config.device
    )  # a spawned rank knows nothing of its parent's
    from paddle_impl.engine import build_engine

    join_pipeline(world.rank, world.endpoints, config.device)
    return build_engine


def _wait_for_all(stages: int) -> None:
    import paddle

    if stages > 1:
        everybody = paddle.zeros([1])
        paddle.distributed.all_reduce(everybody)
        everybody.item()  # a GPU has only queued it
