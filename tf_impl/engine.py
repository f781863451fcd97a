"""The engine: the harness' view of a `GPipeModel`, in canonical names and NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from common.runtime.decode import Extension, Feed, run_decoding
from common.runtime.engine import Arrays, Engine
from common.runtime.executor import Event, unwatched
from common.runtime.memory import peak_resident_bytes
from common.schedule.action import Action
from common.schedule.generators import make_schedule
from common.spec.data import IGNORED, Batch
from common.spec.parameters import TensorKey, parameter_shapes, unit_names
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from tf_impl import devices, gpus
from tf_impl.device_shards import CrossEntropy
from tf_impl.gpipe_model import GPipeModel
from tf_impl.keras_optimizers import make_optimizer
from tf_impl.optimizer import learning_rate
from tf_impl.probe import probe_units
from tf_impl.stage import Channel
from tf_impl.weights import (
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
    to_array,
)


def build_engine(config: RunConfig) -> Engine:
    """Return the engine of `config`. Raises ScheduleError or ValueError for a run that cannot be."""  # noqa: E501
    if config.executor != "table":
        from tf_impl.baseline import build_baseline

        return build_baseline(config)
    return PipelineEngine(config)


class PipelineEngine:
    """The stages of this process, each with a thread of its own (`common.runtime.engine.Engine`):
    all of them, unless a subclass (`tf_impl.rank_engine`) holds one.

    Differs: the stages, threads and optimizers are those of the Keras model, so that the harness
    measures what a Keras user gets.
    """

    replica = 0

    def __init__(
        self, config: RunConfig, model_type: Callable[..., GPipeModel] = GPipeModel
    ) -> None:
        self.config = config
        model, train = config.model, config.train
        plan = plan_partition(config)
        self.model = model_type(
            model,
            config.stages,
            train.micro_batches,
            make_schedule(config.schedule, config.stages, train.micro_batches, config.chunks),
            partition=plan.boundaries[1:-1],
            recompute=config.recompute,
            device=config.device,
            dtype=train.dtype,
            seed=train.seed,
            tensor_parallel=config.tensor_parallel,
            vocab_parallel=config.vocab_parallel,
        )
        self.devices = self.model.held
        self.on_action: Callable[[int, Action | None], None] = unwatched
        self.model.on_action = lambda device, action: self.on_action(device, action)
        self.model.times_actions |= config.action_times
        self.model.build((None, model.context_length))
        units = [unit for unit in self.model.units if unit.built]  # those that are here
        named = named_parameters([unit.unit_name for unit in units], units, model.tied_head)
        # The harness sees what the optimizer updates: float32 where the layers have bfloat16.
        self._named = [
            item._replace(parameter=self.model.master_of(item.parameter)) for item in named
        ]
        not_decayed = [item.parameter for item in self._named if not train.decays(item.name)]
        # Over (B, S, V) logits and (B, S) targets, in float32 at least.
        loss = CrossEntropy(
            from_logits=True,
            ignore_class=IGNORED,
            dtype="float64" if train.dtype == "float64" else "float32",
        )
        self.model.compile(make_optimizer(train, not_decayed), loss)
        self._part_of = {unit: plan.part_of(unit) for unit in unit_names(model)}

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, weights)
        self.model.cast_masters()  # the layers' own copies, where they have less precise ones
        for d in self.devices:
            for chunk in self.model.stages[d].chunks:
                chunk.clear_gradients()
        self.model.reset_optimizer()
        gpus.reset_peaks(self.model.stage_devices)

    def forward_backward(self, batch: Batch) -> float:
        return self.model.forward_backward(batch.inputs, batch.targets, step=batch.step)

    def apply_gradients(self, step: int) -> float:
        self.model.optimizer.learning_rate = learning_rate(self.config.train, step)
        return self.model.apply_gradients(step)

    def evaluate(self, batch: Batch) -> float:
        # Without labels in the pass itself: the last stage makes its part of the loss of each
        # prediction, (b, S, V), and keeps no more than that.
        pieces = batch.share(self.replica, self.config.replicas, self.config.train.micro_batches)
        losses, _ = self.model.forward_pieces(
            batch.inputs[self._rows(batch)],
            lambda i, logits: self.model.summed_loss(
                logits, tf.constant(pieces[i].targets), batch.num_tokens
            ),
        )
        return math.fsum(self._everybodys([float(loss) for loss in losses]))

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        inputs = tf.constant(batch.inputs[self._rows(batch)])
        outputs = self.model.unit_outputs(inputs, self._context(batch))
        found, first = {}, self.replica * self.config.train.micro_batches
        for unit in self.model.units:
            device = self.model.schedule.location[self._part_of[unit.unit_name]][0]
            for i in range(self.config.train.micro_batches):
                if (i, unit.name) in outputs:
                    key = TensorKey(
                        batch.step, "forward", device, first + i, unit.unit_name, "output"
                    )
                    found[key] = to_array(outputs[i, unit.name])
        return found

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        found = self.model.on_all_stages(
            lambda d: probe_units(
                self.model, d, batch, inputs, output_gradients, self.config.replicas
            )
        )
        return {key: array for arrays in found for key, array in arrays.items()}

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return to_array(self.model.forward_only(inputs))

    def decode(self, feed: Feed) -> None:
        forwards = self.model.schedule.only_forward()

        def fed(group: int, logits: tf.Tensor | None) -> Extension | None:
            return feed(group, None if logits is None else to_array(logits))

        def walk(d: int, channel: Channel, before: Callable[[Action], None]) -> None:
            self.model.stages[d].begin_decoding()
            run_decoding(forwards, d, self.model.stages[d], channel, fed, before)

        self.model.walk_all(walk)

    def optimizer_state(self) -> Arrays:
        return {
            f"{moment}/{name}": array
            for moment, moment_of in self.model.moments().items()
            for name, array in self._in_order(export_gradients(self._named, moment_of)).items()
        }

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        for moment, moment_of in self.model.moments().items():
            load_gradients(
                self._named, {i.name: state[f"{moment}/{i.name}"] for i in self._named}, moment_of
            )
        self.model.optimizer.iterations.assign(steps_done)  # Adam's bias correction counts steps

    def weights(self) -> Arrays:
        return self._in_order(export_weights(self._named))

    def gradients(self) -> Arrays:
        return self._in_order(export_gradients(self._named, self.model.gradient_of))

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        load_gradients(self._named, gradients, self.model.gradient_of)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def events(self) -> dict[int, list[Event]]:
        return self.model.events

    def environment(self) -> dict[str, Any]:
        said = devices.environment(self.model.shard_devices) | devices.best_track(self.config)
        if said["device_kind"] == "cpu":
            return said
        functions = [each for chunk in self.model.chunks for each in chunk.functions]
        graphs = [made.graph for each in functions for made in each.made().values()]
        return said | {"without_gpu_kernel": ", ".join(gpus.without_kernel(graphs))}

    def peak_memory_bytes(self) -> dict[int, int]:
        """As the protocol says, by logical device: stages that share one are counted together,
        under the first of them. Of a stage that is cut, that of its first shard.
        """
        return gpus.peaks(self.model.stage_devices) or {self.devices[0]: peak_resident_bytes()}

    def held_bytes_peak(self) -> dict[int, int]:
        return {d: self.model.stages[d].held.peak_bytes for d in self.devices}

    def in_flight_peak(self) -> dict[int, int]:
        return {d: self.model.stages[d].held.peak_in_flight for d in self.devices}

    def close(self) -> None:
        self.model.close()

    def _in_order(self, found: Arrays) -> Arrays:
        return {n: found[n] for n in parameter_shapes(self.config.model) if n in found}

    def _rows(self, batch: Batch) -> slice:
        """This replica's share of a mini-batch's rows."""
        pieces = batch.share(self.replica, self.config.replicas, self.config.train.micro_batches)
        return slice(int(pieces[0].samples[0]), int(pieces[-1].samples[-1]) + 1)

    def _context(self, batch: Batch) -> list[tuple[int, NDArray[Any]]]:
        """`GPipeModel.dropout_context` of this replica's rows: samples are numbered over all."""
        rows = self._rows(batch)
        own = self.model.dropout_context(rows.stop - rows.start, batch.step)
        return [(key, samples + rows.start) for key, samples in own]

    def _everybodys(self, values: list[float]) -> list[float]:
        """The values of all processes, in any order: losses of micro-batches, or squared norms."""
        return values
