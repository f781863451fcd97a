"""What a PyTorch user would write without this project: a plain loop, and PyTorch's pipeline.

Both have the same model, weights, batches, optimizer and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.oracle.reference import clip_scale, global_norm
from common.runtime.baseline_engine import BaselineEngine
from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Arrays, Engine
from common.runtime.memory import peak_resident_bytes
from common.spec.data import Batch
from common.spec.dropout_masks import step_key
from common.spec.parameters import TensorKey, parameter_shapes, unit_names
from common.spec.run import RunConfig
from torch_impl import devices, graphs, streams, workspaces
from torch_impl.gradients import gradient_of
from torch_impl.layers import Embedding, Head, summed_loss
from torch_impl.optimizer import StageOptimizer
from torch_impl.units import Units
from torch_impl.weights import (
    NamedParameter,
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
    to_array,
)


class PlainEngine(BaselineEngine):
    """Every tutorial's loop: the whole model, the whole mini-batch at once, `loss.backward()`."""

    replica = 0
    """Whose rows of the mini-batch are computed here."""

    def __init__(self, config: RunConfig, device: torch.device | None = None) -> None:
        """`device` belongs to a process that shares the run (`torch_impl.data_parallel`)."""
        if device is None:
            device = devices.stage_devices(1, config.device)[0]
            streams.prepare_thread(device, threads_per_stage(1, config.threads))
        part = unit_names(config.model)
        self.model = Units(config, part, device)
        named = named_parameters(part, list(self.model.units), config.model.tied_head)
        if config.model.tied_head:  # as its users tie it: one parameter, used twice
            embedding, head = self.model.units[0], self.model.units[-1]
            assert isinstance(embedding, Embedding) and isinstance(head, Head)
            head.output.weight = embedding.token.weight
            named = [item for item in named if not item.is_copy]
        self._place(config, device, 0, [self.model], named)

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, weights)
        for item in self._named:
            gradient_of(item.parameter).zero_()
        self._reset_optimizer()

    def forward_backward(self, batch: Batch) -> float:
        self._set_step_key(batch, training=True)
        # Not set to None: the optimizer has taken these tensors.
        torch._foreach_zero_([gradient_of(item.parameter) for item in self._named])
        loss = self._loss(batch)
        loss.backward()
        return loss.item()

    def apply_gradients(self, step: int) -> float:
        norm = global_norm(self._optimizer.squared_norms())
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        self._set_step_key(batch, training=False)
        return self._loss(batch).item()

    @torch.no_grad()
    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        self._set_step_key(batch, training=True)
        self.model.outputs = []
        self._loss(batch)
        found, self.model.outputs = self.model.outputs, None
        m = self.config.train.micro_batches
        return {
            # In as many pieces as the others have micro-batches: each is compared by itself.
            TensorKey(batch.step, "forward", 0, self.replica * m + i, unit, "output"): piece.numpy()
            for unit, output in found
            for i, piece in enumerate(output.cpu().tensor_split(m))
        }

    @torch.no_grad()
    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self._set_step_key(Batch(0, inputs, inputs), training=False)
        tokens = torch.from_numpy(inputs).to(self._device)
        return to_array(self.model(tokens, torch.arange(len(tokens), device=self._device)))

    def optimizer_state(self) -> Arrays:
        return self._optimizer.state()

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        self._optimizer.load_state(state, steps_done)

    def weights(self) -> Arrays:
        return self._in_order(export_weights(self._named))

    def gradients(self) -> Arrays:
        """As the protocol says, until `apply_gradients` clips them in place."""
        return self._in_order(export_gradients(self._named))

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        load_gradients(self._named, gradients)

    def environment(self) -> dict[str, Any]:
        said = devices.environment([self._device]) | devices.best_track(self.config)
        return said | graphs.environment(self.config, self._device)

    def peak_memory_bytes(self) -> dict[int, int]:
        if self._device.type == "cuda":
            return {self.devices[0]: torch.cuda.max_memory_allocated(self._device)}
        return {self.devices[0]: peak_resident_bytes()}

    def close(self) -> None:
        workspaces.free_workspaces([self._device])

    def _loss(self, batch: Batch) -> Tensor:
        tokens, targets, samples = self._tensors(batch)
        return summed_loss(self.model(tokens, samples), targets, batch.num_tokens)

    def _place(
        self,
        config: RunConfig,
        device: torch.device,
        rank: int,
        units: Sequence[Units],
        named: list[NamedParameter],
    ) -> None:
        """Takes what is trained here: the rank's units and their parameters."""
        self.config, self.devices = config, (rank,)
        self._device, self._units, self._named = device, units, named
        for item in named:
            item.parameter.grad = torch.zeros_like(item.parameter)
        self._reset_optimizer()

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, S), targets (B, S) and sample indices (B,) of this replica."""
        # Those that the table's replica has, all at once.
        share = self.replica, self.config.replicas, self.config.train.micro_batches
        samples = torch.from_numpy(np.concatenate([one.samples for one in batch.share(*share)]))
        tokens, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        tokens, targets = tokens[samples], targets[samples]
        return tokens.to(self._device), targets.to(self._device), samples.to(self._device)

    def _set_step_key(self, batch: Batch, training: bool) -> None:
        for units in self._units:
            units.step_key = step_key(self.config.train.seed, batch.step) if training else None

    def _reset_optimizer(self) -> None:
        self._optimizer = StageOptimizer(self.config.train, self._named)

    def _in_order(self, found: Arrays) -> Arrays:
        return {name: found[name] for name in parameter_shapes(self.config.model) if name in found}


def build_baseline(config: RunConfig) -> Engine:
    """Return the engine for `executor` plain or native. Raises ValueError for what neither does."""
    if config.recompute != "none":
        raise ValueError(f"recompute = {config.recompute}; executor = {config.executor} takes none")
    if config.train.dtype == "bfloat16":
        raise ValueError(f"dtype = bfloat16; executor = {config.executor} takes float32 or float64")
    if config.executor == "plain":
        return PlainEngine(config)
    from torch_impl.torch_pipelining import PipeliningEngine  # which builds on this module

    return PipeliningEngine(config)
