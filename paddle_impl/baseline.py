"""What a Paddle user would write without this project: a plain loop. Paddle's pipeline is fleet's.

That one, `pipeline.NativePipeline`, lives beside our own because both share fleet's layers; here is
the loop, with the same model, weights, batches, optimizer and threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from common.oracle.reference import clip_scale, global_norm
from common.runtime.baseline_engine import BaselineEngine
from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Arrays, Engine
from common.spec.data import Batch
from common.spec.dropout_masks import step_key
from common.spec.parameters import TensorKey, parameter_shapes, unit_names
from common.spec.run import RunConfig
from paddle_impl import devices, process
from paddle_impl.dropout import DropoutContext
from paddle_impl.groups import here
from paddle_impl.layers import build_unit, summed_loss
from paddle_impl.optimizer import StageOptimizer
from paddle_impl.programs import make_static, static_units
from paddle_impl.split_linear import merge_backward
from paddle_impl.weights import (
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
    to_array,
)


class PlainEngine(BaselineEngine):
    """The loop of every tutorial: the whole model, the whole mini-batch at once, `loss.backward()`.

    It answers what the harness asks (`common.runtime.engine.Engine`).
    """

    replica = 0
    """Whose rows of the mini-batch are computed here."""

    def __init__(self, config: RunConfig) -> None:
        if config.recompute != "none":
            raise ValueError(f"recompute = {config.recompute}; executor = plain takes none")
        devices.check_dtype(config.train.dtype)
        self.config = config
        process.set_threads(threads_per_stage(here().world.local_size, config.threads))
        process.forget_peak_memory()
        paddle.set_default_dtype(config.train.dtype)
        self._context = DropoutContext(config.model.dropout_masks == "native")
        part = unit_names(config.model)
        self.units = nn.LayerList([build_unit(config.model, name, self._context) for name in part])
        merge_backward(self.units)
        if static_units(config):
            make_static(self.units)
        self._named = named_parameters(part, list(self.units), config.model.tied_head)
        if config.model.tied_head:  # as its users tie it: one parameter, used twice
            self.units[-1].tied_weight = token = self.units[0].token.weight
            head = self.units[-1]
            head.forward = lambda x: paddle.matmul(head.norm(x), token, transpose_y=True)
            self._named = [item for item in self._named if not item.is_copy]
        self.model = self._outputs = _Units(self.units)
        self._optimizer = StageOptimizer(config.train, self._named)

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, weights)
        self._optimizer = StageOptimizer(self.config.train, self._named)

    def forward_backward(self, batch: Batch) -> float:
        self._clear_gradients()
        loss = self._loss(batch, training=True)[0]
        loss.backward()
        return float(loss)

    def apply_gradients(self, step: int) -> float:
        norm = global_norm(self._optimizer.squared_norms().values())
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    @paddle.no_grad()
    def evaluate(self, batch: Batch) -> float:
        return float(self._loss(batch, training=False)[0])

    @paddle.no_grad()
    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        outputs, m = self._loss(batch, training=True)[1], self.config.train.micro_batches
        return {
            TensorKey(batch.step, "forward", 0, self.replica * m + i, unit, "output"): (
                piece.numpy().copy()
            )
            for unit, output in zip(unit_names(self.config.model), outputs, strict=True)
            for i, piece in enumerate(output.tensor_split(m))
        }

    @paddle.no_grad()
    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self._context.step_key = None
        return to_array(self.model(paddle.to_tensor(inputs))[-1])

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
        used = devices.stage_devices(1, self.config.device)
        return devices.environment(used) | devices.best_track(self.config)

    def peak_memory_bytes(self) -> dict[int, int]:
        return {0: process.peak_memory_bytes()}

    def _loss(self, batch: Batch, training: bool) -> tuple[Tensor, list[Tensor]]:
        """This replica's share of the mean loss per token, and every unit's output for its rows."""
        pieces = batch.share(self.replica, self.config.replicas, self.config.train.micro_batches)
        inputs, targets, samples = (
            np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("inputs", "targets", "samples")
        )
        self._context.step_key = step_key(self.config.train.seed, batch.step) if training else None
        self._context.samples = samples
        outputs = self._outputs(paddle.to_tensor(inputs))
        return summed_loss(outputs[-1], paddle.to_tensor(targets), batch.num_tokens), outputs

    def _clear_gradients(self) -> None:
        for item in self._named:
            item.parameter.clear_gradient(set_to_zero=False)

    def _in_order(self, found: Arrays) -> Arrays:
        return {name: found[name] for name in parameter_shapes(self.config.model)}


class _Units(nn.Layer):
    """All units, one after another."""

    def __init__(self, units: nn.LayerList) -> None:
        super().__init__()
        self.units = units

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return every unit's output."""
        outputs = [tokens]
        for unit in self.units:
            outputs.append(unit(outputs[-1]))
        return outputs[1:]


def build_baseline(config: RunConfig) -> Engine:
    """Return the engine for `executor` = plain; for native, `build_engine` takes fleet's."""
    if config.replicas > 1:
        from paddle_impl.data_parallel import DataParallelEngine  # which builds on this module

        return DataParallelEngine(config)
    return PlainEngine(config)
