"""Paddle's DataParallel as its users write it: the whole model in every process, and a plain loop
over this replica's rows. A baseline for p = 1; why its like does not fit a pipeline stands in
`torch_impl/rank_engine.py`.

Differs: TensorFlow's replicas are devices of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import paddle
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.communication.group import Group

from common.spec.data import Batch
from common.spec.run import RunConfig
from paddle_impl.baseline import PlainEngine
from paddle_impl.groups import here, sum_over_ranks


class DataParallelEngine(PlainEngine):
    """One replica of the plain loop (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.replica = here().place.replica
        self._outputs = paddle.DataParallel(self.model, group=_group_of_gloo())

    def forward_backward(self, batch: Batch) -> float:
        self._clear_gradients()
        loss = self._loss(batch, training=True)[0]
        # It averages over the replicas; the loss is divided by all tokens already.
        (loss * self.config.replicas).backward()
        return math.fsum(self.sum_over_ranks([float(loss)]))

    def evaluate(self, batch: Batch) -> float:
        return math.fsum(self.sum_over_ranks([super().evaluate(batch)]))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return sum_over_ranks(values)


def _group_of_gloo() -> Group | None:
    """A group of all ranks that DataParallel can use: it is C++, and calls no Python.

    None where each rank has a GPU: it takes NCCL's. Raises ValueError where ranks share one.
    """
    joined = here()
    if not joined.through_host:
        return None
    if joined.devices[0] != "cpu":
        raise ValueError("executor = plain: each replica takes a GPU; expected device = cpu")
    rank, size, number = joined.world.rank, joined.world.size, collective._new_ring_id()
    own = core.ProcessGroupGloo.create(collective._default_store, rank, size, number)
    group = Group(rank, number, list(range(size)), pg=own, name=f"gloo {number}")
    collective._group_map[number] = group
    return group
