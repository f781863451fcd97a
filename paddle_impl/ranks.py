"""One process per stage (`common.runtime.ranks`), as Paddle joins them.

`paddle.distributed.launch` takes 3 s to start two stages where this takes 1.4 s.

Differs: PyTorch needs it for its own pipeline alone, TensorFlow for nothing: their stages are
threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

from common.runtime.engine import Engine
from common.runtime.job import Job
from common.runtime.ranks import Ranks
from common.runtime.ranks import run_on_ranks as run
from common.spec.run import RunConfig


def run_on_ranks(jobs: Sequence[Job]) -> int:
    """Run the jobs, which share `stages` and `device`, on one process per stage. Returns the exit
    status.
    """
    from paddle_impl.drift import switch  # after `devices.configure`, since it imports Paddle

    return run(Ranks("paddle_impl", _join, _wait_for_all), jobs, switch)


def join_pipeline(rank: int, endpoints: Sequence[str], device: str) -> None:
    """Make this process stage `rank` of a pipeline whose processes listen at `endpoints`
    (host:port).

    Waits until all have joined. Raises ConnectionError if one of them does not.
    """
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.log_util import set_log_level

    from paddle_impl import devices, sockets

    set_log_level("ERROR")
    warnings.filterwarnings(
        "ignore", message="No shared comm will be constructed"
    )  # any model without a tied head
    if len(endpoints) == 1:
        warnings.filterwarnings(
            "ignore", message="Current(ly not a parallel execution| global rank 0 is not in group)"
        )

    name = devices.stage_devices(len(endpoints), device)[rank]
    os.environ.update(
        PADDLE_TRAINER_ID=str(rank),
        PADDLE_TRAINERS_NUM=str(len(endpoints)),
        PADDLE_TRAINER_ENDPOINTS=",".join(endpoints),
        PADDLE_CURRENT_ENDPOINT=endpoints[rank],
        PADDLE_MASTER=endpoints[0],
    )
    if name == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        sockets.enable()
    else:
        os.environ.update(FLAGS_selected_gpus=name.removeprefix("gpu:"))
    paddle.set_device(name)
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


def _join(rank: int, endpoints: Sequence[str], config: RunConfig) -> Callable[[RunConfig], Engine]:
    from paddle_impl.engine import build_engine

    join_pipeline(rank, endpoints, config.device)
    return build_engine


def _wait_for_all(stages: int) -> None:
    import paddle

    if stages > 1:
        paddle.distributed.all_reduce(paddle.zeros([1]))
