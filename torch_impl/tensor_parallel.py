"""DTensor's `parallelize_module` as its users write it: a plan by names cuts the blocks of a plain
model, the rest of the loop stays as it is. A baseline for p = 1 and d = 1.

What is left whole are plain tensors, and PyTorch 2.13's fused and `foreach` kernels refuse to take
both kinds at once ("got mixed torch.Tensor and DTensor"), as does `clip_grad_norm_`. So the
optimizer gets the local tensor of every DTensor here.

Differs: Paddle's and TensorFlow's users have no such function that runs on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from common.oracle.reference import clip_scale, global_norm
from common.runtime.engine import Arrays
from common.runtime.world import World
from common.spec.run import RunConfig
from common.spec.shards import COLUMNS, ROWS, cut_axis, shards_of
from torch_impl.baseline import PlainEngine
from torch_impl.layers import Block
from torch_impl.rank_engine import gathered
from torch_impl.shard_engine import whole_arrays
from torch_impl.weights import named_parameters


class TensorParallelEngine(PlainEngine):
    """One shard of the plain loop (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        super().__init__(config, device)
        self._shard = world.rank
        mesh = init_device_mesh(device.type, (world.size,))
        for unit in self.model.units:
            if isinstance(unit, Block):
                names = [name for name, _ in unit.named_modules()]
                plan: dict[str, ParallelStyle] = {
                    **{name: ColwiseParallel() for name in names if name.endswith(COLUMNS)},
                    **{name: RowwiseParallel() for name in names if name.endswith(ROWS)},
                }
                parallelize_module(unit, mesh, plan)
        cut = named_parameters(self.model.part, list(self.model.units), config.model.tied_head)
        found = {item.name: item.parameter for item in cut if not item.is_copy}
        self._named = [item._replace(parameter=_local(found[item.name])) for item in self._named]
        self._reset_optimizer()

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        super().reset(shards_of(self.config, weights, self._shard))

    def apply_gradients(self, step: int) -> float:
        own = self._optimizer.squared_norms(
            lambda name: self._shard == 0 or cut_axis(self.config, name) is not None
        )
        norm = global_norm(square for row in gathered(own) for square in row)
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    def optimizer_state(self) -> Arrays:
        return self._whole(super().optimizer_state())

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        super().load_optimizer_state(shards_of(self.config, state, self._shard), steps_done)

    def weights(self) -> Arrays:
        return self._whole(super().weights())

    def gradients(self) -> Arrays:
        return self._whole(super().gradients())

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        super().set_gradients(shards_of(self.config, gradients, self._shard))

    def _whole(self, own: Arrays) -> Arrays:
        return whole_arrays(self.config, own, lambda key: key.split("/")[-1], gathered)

    def sum_over_ranks(self, values: Any) -> list[float]:
        return [sum(column) for column in zip(*gathered(list(values)), strict=True)]


@torch.no_grad()
def _local(parameter: Tensor) -> Tensor:
    """The memory of a DTensor's own part, with a gradient that is the memory of its gradient's."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local()
    local.grad = torch.zeros_like(local)
    parameter.grad = DTensor.from_local(local.grad, parameter.device_mesh, parameter.placements)
    return local
