"""DistributedDataParallel as its users write it: the whole model in every process, and a plain loop
over this replica's rows. A baseline for p = 1; why it does not fit a pipeline stands in
`torch_impl/rank_engine.py`. Its hooks compress gradients; bfloat16's refuses CPUs.

Differs: TensorFlow's replicas are devices of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from common.runtime.world import World
from common.spec.compression import Compression
from common.spec.data import Batch
from common.spec.run import RunConfig
from torch_impl.baseline import PlainEngine
from torch_impl.gradients import gradient_of
from torch_impl.layers import summed_loss
from torch_impl.rank_engine import gathered


class DataParallelEngine(PlainEngine):
    """One replica of the plain loop (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        super().__init__(config, device)
        self.replica = world.rank
        self._parallel = DistributedDataParallel(self.model)
        match config.compression:
            case Compression("fp16"):
                self._parallel.register_comm_hook(None, fp16_compress_hook)
            case Compression("powersgd", rank):
                # From its second step on, the first that its warm start allows.
                state = PowerSGDState(None, rank, start_powerSGD_iter=2)
                self._parallel.register_comm_hook(state, powerSGD_hook)

    def forward_backward(self, batch: Batch) -> float:
        self._set_step_key(batch, training=True)
        torch._foreach_zero_([gradient_of(item.parameter) for item in self._named])
        tokens, targets, samples = self._tensors(batch)
        loss = summed_loss(self._parallel(tokens, samples), targets, batch.num_tokens)
        # It averages over the replicas; the loss is divided by all tokens already.
        (loss * self.config.replicas).backward()
        return math.fsum(self.sum_over_ranks([loss.item()]))

    def evaluate(self, batch: Batch) -> float:
        return math.fsum(self.sum_over_ranks([super().evaluate(batch)]))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [math.fsum(column) for column in zip(*gathered(list(values)), strict=True)]
