"""Skips this folder where Paddle is not installed, and makes engines whose stages are processes
look like one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from paddle_impl import devices  # before Paddle: its package chooses the kernels of Paddle's MKL

pytest.importorskip("paddle")

from common.spec.run import RunConfig
from paddle_impl.ranks import join_pipeline
from tests.engines import Make, maker
from tests.paddle.ranks import Pipeline, Ranks

devices.configure(1, 1, "cpu")
join_pipeline(0, ["127.0.0.1:0"], "cpu")  # this process is a pipeline of one stage, for all tests


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """By number of stages: processes that stay for all tests, since they start slowly."""
    started: dict[int, Ranks] = {}

    def of(stages: int) -> Ranks:
        if stages not in started or not started[stages].alive:
            started[stages] = Ranks(stages)
        return started[stages]

    yield of
    for one in started.values():
        one.end()


@pytest.fixture
def make(ranks: Callable[[int], Ranks]) -> Iterator[Make]:
    """One stage is in this process, more are in processes of their own."""
    from paddle_impl.engine import build_engine  # after `configure`, since it imports Paddle

    def build(config: RunConfig) -> object:
        return (
            build_engine(config) if config.stages == 1 else Pipeline(ranks(config.stages), config)
        )

    yield from maker("paddle", build)
