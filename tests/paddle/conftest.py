"""Skips this folder where Paddle is not installed, and makes engines whose stages are processes
look like one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from paddle_impl import devices  # before Paddle: its package chooses the kernels of Paddle's MKL

pytest.importorskip("paddle")

from common.runtime.world import World
from common.spec.mesh import Mesh
from common.spec.run import RunConfig
from paddle_impl.ranks import join_pipeline
from tests.engines import Make, maker
from tests.paddle.ranks import Pipeline, Ranks

devices.configure(1, 1, "cpu")
# This process is a pipeline of one stage, for all tests.
join_pipeline(World(0, ("127.0.0.1:0",)), Mesh(1, 1), "cpu")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[Mesh], Ranks]]:
    """By their mesh: processes that stay for all tests, since they start slowly."""
    started: dict[Mesh, Ranks] = {}

    def of(mesh: Mesh) -> Ranks:
        if mesh not in started or not started[mesh].alive:
            started[mesh] = Ranks(mesh)
        return started[mesh]

    yield of
    for one in started.values():
        one.end()


@pytest.fixture
def make(ranks: Callable[[Mesh], Ranks]) -> Iterator[Make]:
    """One stage is in this process, more are in processes of their own."""
    from paddle_impl.engine import build_engine  # after `configure`, since it imports Paddle

    def build(config: RunConfig) -> object:
        mesh = Mesh.of(config)
        return build_engine(config) if mesh.size == 1 else Pipeline(ranks(mesh), config)

    yield from maker("paddle", build)
