"""One process per stage (`common.runtime.ranks`), as Paddle joins them.

`paddle.distributed.launch` takes 3 s to start two stages where this takes 1.4 s.
"""

from __future__ import annotations

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


def _join(rank: int, endpoints: Sequence[str], config: RunConfig) -> Callable[[RunConfig], Engine]:
    from paddle_impl import devices
    from paddle_impl.engine import build_engine

    devices.join_pipeline(rank, endpoints, config.device)
    return build_engine


def _wait_for_all(stages: int) -> None:
    import paddle

    if stages > 1:
        paddle.distributed.all_reduce(paddle.zeros([1]))
