"""The engine: this process' stage of fleet's pipeline. All processes make the same calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.distributed import fleet

from common.oracle.reference import clip_scale, global_norm
from common.runtime.cpus import threads_per_stage
from common.runtime.decode import Extension, Feed, run_decoding
from common.runtime.engine import Arrays, Engine
from common.runtime.executor import Event, unwatched
from common.runtime.mode import Mode
from common.schedule.action import Action
from common.schedule.generators import make_schedule
from common.spec.data import Batch
from common.spec.mesh import Mesh
from common.spec.parameters import TOKEN_EMBEDDING, TensorKey, parameter_shapes
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from common.spec.shards import cut_axis, own_tokens, shard_of, shard_shape, shards_of
from paddle_impl import devices, process
from paddle_impl.dropout import DropoutContext
from paddle_impl.fleet import StageLayers, build_pipeline
from paddle_impl.groups import connect_ring, here, sum_over_ranks
from paddle_impl.optimizer import StageOptimizer
from paddle_impl.probe import probe_units
from paddle_impl.programs import make_static, static_units
from paddle_impl.ring import Ring
from paddle_impl.shards import Shards
from paddle_impl.stage import Stage
from paddle_impl.weights import (
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
    to_array,
)

_Key = TypeVar("_Key")


def build_engine(config: RunConfig) -> Engine:
    """Return the engine of `config`, after `join_pipeline`. Raises ScheduleError or ValueError."""
    if config.executor == "plain":
        from paddle_impl.baseline import build_baseline

        return build_baseline(config)
    return PipelineEngine(config)


class PipelineEngine:
    """One stage of one replica, in a process of its own (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.schedule = make_schedule(
            config.schedule, config.stages, config.train.micro_batches, config.chunks
        )
        if config.executor == "native" and (self.schedule.name != "1f1b" or config.chunks > 1):
            raise ValueError(
                f"schedule = {config.schedule}; executor = native takes 1f1b, fleet's own"
            )
        if config.executor == "native" and config.recompute != "none":
            raise ValueError(f"recompute = {config.recompute}; executor = native takes none")
        devices.check_dtype(config.train.dtype)
        joined = here()
        if joined.mesh != (mesh := Mesh.of(config)):
            raise ValueError(f"the run needs {mesh}; the processes have joined as {joined.mesh}")
        self._stage, self._replica, self._shard = joined.place
        self.devices: tuple[int, ...] = (self._stage,)
        self.on_action: Callable[[int, Action | None], None] = unwatched
        process.set_threads(threads_per_stage(joined.world.local_size, config.threads))
        gc.collect()  # an earlier engine of this process: fleet's objects refer to each other
        process.forget_peak_memory()
        paddle.set_default_dtype(config.train.master_dtype)  # that of parameters
        plan = plan_partition(config)
        context = DropoutContext(config.model.dropout_masks == "native")
        tokens = [own_tokens(config, shard) for shard in range(config.tensor_parallel)]
        columns = tuple(map(len, tokens)) if config.vocab_parallel else ()
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        self._shards = Shards(config.tensor_parallel, self._shard, columns, group)
        layers = StageLayers(config, plan, self.schedule, context, self._shards)
        parts = [plan.parts[k] for k in self.schedule.parts[self._stage]]
        chunks = layers.chunks()
        named = [
            named_parameters(part, units, config.model.tied_head)
            for part, units in zip(parts, chunks, strict=True)
        ]
        if static_units(config):
            make_static(unit for units in chunks for unit in units)
        self.stage = Stage(config, parts, chunks, named, context, self._replica, self._shards)
        self._named = self.stage.named
        for item in self._named:  # fleet makes all others equal on the shards
            item.parameter.is_distributed = cut_axis(config, item.name) is not None
        self.pipeline = build_pipeline(config, layers, self.schedule)
        self._events: list[Event] = []
        self._optimizer = StageOptimizer(config.train, self._named)

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, self._own(weights))
        self.pipeline.compressors = {}
        self._optimizer = StageOptimizer(self.config.train, self._named)

    def forward_backward(self, batch: Batch) -> float:
        self._begin(batch, Mode.TRAIN)
        loss = self.pipeline.forward_backward_pipeline(self.pipeline.micro_batches())
        self._events = self.pipeline.events()
        self._add_tied_gradients()
        return float(loss)

    def apply_gradients(self, step: int) -> float:
        """As the protocol says. The gradients are clipped in place: read them before."""
        norm = global_norm(self._squared_norms())
        self._optimizer.step(step, clip_scale(norm, self.config.train.clip_norm))
        return norm

    def evaluate(self, batch: Batch) -> float:
        self._begin(batch, Mode.EVALUATE)
        self.pipeline.walk(self.schedule.only_forward())
        return float(self.pipeline._broadcast_final_loss())

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        self._begin(batch, Mode.RECORD)
        self.pipeline.walk(self.schedule.only_forward())
        key = TensorKey(batch.step, "forward", self._stage, -1, "", "output")
        return {
            key._replace(micro_batch=self.stage.first + i, unit=unit): to_array(output)
            for (unit, i), output in self.stage.outputs.items()
        }

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        copies = self.pipeline.dp_group if self.config.replicas > 1 else None
        axis = 2 if self._shards.columns else None  # (B, S, V)
        own = shard_of(output_gradients["head"], axis, self._shard, self._shards.count)
        given = {**output_gradients, "head": own}
        found = probe_units(self.stage, self._stage, batch, inputs, given, copies)
        return self._joined(found, lambda key: key.tensor)

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self._begin(Batch(0, inputs, np.zeros_like(inputs)), Mode.PREDICT)
        self.pipeline.walk(self.schedule.only_forward())
        # of the rank that has the head
        pieces = [self.stage.outputs.pop(key) for key in sorted(self.stage.outputs)]
        shape = [*inputs.shape, self.config.model.vocab_size]
        # (B, S, V)
        logits = paddle.concat(pieces) if pieces else paddle.empty(shape, self.config.train.dtype)
        if self.config.stages > 1:
            group = self.pipeline.pp_group
            paddle.distributed.broadcast(logits, group.ranks[self.schedule.location[-1][0]], group)
        return to_array(logits)

    def decode(self, feed: Feed) -> None:
        forwards = self.schedule.only_forward()
        connect_ring(forwards)
        ring = Ring(self._stage, self.config.model, self.config.train.dtype)

        def fed(group: int, logits: Tensor | None) -> Extension | None:
            return feed(group, None if logits is None else to_array(logits))

        self.stage.begin_decoding()
        run_decoding(
            forwards, self._stage, self.stage, ring, fed, partial(self.on_action, self._stage)
        )
        self.on_action(self._stage, None)

    def optimizer_state(self) -> Arrays:
        return self._joined(self._optimizer.state(), lambda key: key.partition("/")[2])

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        self._optimizer.load_state(self._own(state), steps_done)

    def weights(self) -> Arrays:
        return self._joined(export_weights(self._named), str)

    def gradients(self) -> Arrays:
        """As the protocol says, until `apply_gradients` clips them in place."""
        return self._joined(export_gradients(self._named), str)

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        load_gradients(self._named, self._own(gradients))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return sum_over_ranks(values)

    def events(self) -> dict[int, list[Event]]:
        return {self._stage: self._events}

    def environment(self) -> dict[str, Any]:
        used = [here().devices[rank] for rank in here().pipeline]
        return devices.environment(used) | devices.best_track(self.config)

    def peak_memory_bytes(self) -> dict[int, int]:
        """As the protocol says; on a CPU since this engine was built, if Linux resets the peak."""
        return {self._stage: process.peak_memory_bytes()}

    def held_bytes_peak(self) -> dict[int, int]:
        # a program's tensors are its own
        if self.config.executor == "native" or static_units(self.config):
            return {}
        return {self._stage: self.stage.held.peak_bytes}

    def in_flight_peak(self) -> dict[int, int]:
        if self.config.executor == "native":
            return {}
        return {self._stage: self.stage.held.peak_in_flight}

    def close(self) -> None:
        self.stage.in_flight.clear()
        self.stage.waiting.clear()
        # fleet makes these groups anew for every model
        for shared in self.pipeline._layers.shared_comm.values():
            paddle.distributed.destroy_process_group(shared["group"])

    def _begin(self, batch: Batch, mode: Mode) -> None:
        self.stage.begin(batch, mode)
        self.pipeline.on_action = self.on_action
        self.pipeline.begin_pass(self.stage)

    def _squared_norms(self) -> list[float]:
        """Each tensor's sum of squares once, in canonical order, from all stages and shards."""
        own = self._optimizer.squared_norms(self._counts)
        names = parameter_shapes(self.config.model)
        return self.sum_over_ranks([own.get(name, 0.0) for name in names])

    def _counts(self, name: str) -> bool:
        """Each replica has all of the norm, and each shard what is not cut."""
        is_cut = cut_axis(self.config, name) is not None
        return self._replica == 0 and (is_cut or self._shard == 0)

    def _own(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        return shards_of(self.config, arrays, self._shard)

    def _joined(
        self, own: dict[_Key, NDArray[Any]], name: Callable[[_Key], str]
    ) -> dict[_Key, NDArray[Any]]:
        """The whole arrays of which all shards, which call this together, have parts; what is not
        cut, as this shard has it.
        """
        config, shapes, found = self.config, parameter_shapes(self.config.model), {}
        for key, array in own.items():
            if (axis := cut_axis(config, name(key))) is not None:
                whole, shards = shapes[name(key)], range(self._shards.count)
                sizes = [shard_shape(config, name(key), whole, n)[axis] for n in shards]
                array = to_array(self._shards.joined(paddle.to_tensor(array), axis, sizes))
            found[key] = array
        return found

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: its own plus that of the head's copy, put in both.

        Where the two are on different ranks, fleet has done it
        (`PipelineLayer.allreduce_shared_weight_gradients`).
        """
        both = [item.parameter for item in self._named if item.name == TOKEN_EMBEDDING]
        if len(both) == 2:
            with paddle.no_grad():
                both[0].grad.add_(both[1].grad)
                both[1].grad.copy_(both[0].grad, True)
