"""What a Keras user would write without this project: `model.compile`, `model.fit`. TensorFlow has
no pipeline of its own.

It has the same model, weights, batches, optimizer and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from common.runtime.baseline_engine import BaselineEngine
from common.runtime.engine import Arrays, Engine
from common.runtime.memory import peak_resident_bytes
from common.spec.data import IGNORED, Batch, MicroBatch
from common.spec.dropout_masks import step_key
from common.spec.parameters import TensorKey, parameter_shapes, unit_names
from common.spec.run import RunConfig
from tf_impl import devices, gpus
from tf_impl.keras_optimizers import make_optimizer, moments_of
from tf_impl.language_model import LanguageModel
from tf_impl.weights import (
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    named_parameters,
)


class PlainEngine(BaselineEngine):
    """`keras.Model.fit`, a step at a time: `train_on_batch` calls what `fit` calls for every batch.

    The whole mini-batch at once. That function also updates the weights, so here `forward_backward`
    does, and `apply_gradients` only reports; it answers all else that the harness asks
    (`common.runtime.engine.Engine`).
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        train = config.train
        self._device = devices.stage_devices(1, config.device)
        keras.config.set_floatx(train.dtype)  # of the loss that Keras reports
        self.model = LanguageModel(config)
        named = named_parameters(unit_names(config.model), self.model.units, config.model.tied_head)
        self._named = [item for item in named if not item.is_copy]
        optimizer = make_optimizer(
            train, [item.parameter for item in self._named if not train.decays(item.name)]
        )
        self._norm = tf.Variable(
            0.0,
            dtype=tf.float64,
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,  # they have the same
        )
        apply = optimizer.apply

        def apply_dense(gradients: list[Any], *arguments: Any) -> Any:
            # An embedding's gradient is rows, one a token: their squares give another norm.
            dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
            self._norm.assign(tf.cast(tf.linalg.global_norm(dense), tf.float64))
            return apply(dense, *arguments)

        optimizer.apply = apply_dense
        # Now, and not in the first step: a checkpoint is loaded into slots that are there.
        optimizer.build([item.parameter for item in self._named])
        self._loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=IGNORED
        )
        self.model.compile(optimizer, self._loss, jit_compile=False)
        self._given: dict[str, tf.Tensor] = {}
        self._first: tuple[Mapping[str, NDArray[Any]], Batch | None] = ({}, None)

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        load_weights(self._named, weights)
        for variable in self.model.optimizer.variables:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        self._given, self._first = {}, (weights, None)
        gpus.reset_peaks(self._device)

    def forward_backward(self, batch: Batch) -> float:
        if self._first[1] is None:
            self._first = self._first[0], batch
        self.model.reset_metrics()
        self.model.optimizer.learning_rate = self.config.train.learning_rate_at(batch.step)
        return float(self.model.train_on_batch(self._inputs(batch), batch.targets))

    def apply_gradients(self, step: int) -> float:
        if self._given:  # `set_gradients`: a step from given gradients, to compare optimizers
            self.model.optimizer.learning_rate = self.config.train.learning_rate_at(step)
            self._update([self._given[item.name] for item in self._named])
            self._given = {}
        return float(tf.convert_to_tensor(self._norm))

    def _update(self, gradients: Sequence[tf.Tensor]) -> None:
        self.model.optimizer.apply(gradients, [item.parameter for item in self._named])

    def evaluate(self, batch: Batch) -> float:
        return float(self._loss(batch.targets, self.model(self._inputs(batch))))

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        m, found = self.config.train.micro_batches, {}
        outputs = self.model.outputs_of_units(self._inputs(batch), training=True)
        for unit, output in zip(unit_names(self.config.model), outputs, strict=True):
            for i, piece in enumerate(tf.split(output, m)):
                found[TensorKey(batch.step, "forward", 0, i, unit, "output")] = piece.numpy()
        return found

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        logits: NDArray[Any] = self.model((tf.constant(inputs),)).numpy()
        return logits

    def optimizer_state(self) -> Arrays:
        return {
            f"{moment}/{name}": array
            for moment, moment_of in self._moments().items()
            for name, array in self._in_order(export_gradients(self._named, moment_of)).items()
        }

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        for moment, moment_of in self._moments().items():
            load_gradients(
                self._named, {i.name: state[f"{moment}/{i.name}"] for i in self._named}, moment_of
            )
        self.model.optimizer.iterations.assign(steps_done)

    def _moments(self) -> dict[str, Callable[[keras.Variable], tf.Variable]]:
        return moments_of(self.model.optimizer, [item.parameter for item in self._named])

    def weights(self) -> Arrays:
        return self._in_order(export_weights(self._named))

    def gradients(self) -> Arrays:
        """Return those of the first step after `reset` only, computed again: Keras keeps none.
        Raises RuntimeError.
        """
        start, batch = self._first
        if batch is None or int(tf.convert_to_tensor(self.model.optimizer.iterations)) > 1:
            raise RuntimeError("Keras keeps no gradients; ask after the first step")
        # At the weights that the first step started from; then those of now are put back.
        now = export_weights(self._named)
        load_weights(self._named, start)
        found = self._gradients_of(batch)
        load_weights(self._named, now)
        names = [item.name for item in self._named]
        return self._in_order(
            {name: np.array(tf.convert_to_tensor(g)) for name, g in zip(names, found, strict=True)}
        )

    def _gradients_of(self, batch: Batch) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = self._loss(batch.targets, self.model(self._inputs(batch), training=True))
        found: list[tf.Tensor] = tape.gradient(loss, [item.parameter.value for item in self._named])
        return found

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        self._given = {name: tf.constant(value) for name, value in gradients.items()}

    def environment(self) -> dict[str, Any]:
        return devices.environment(self._device) | devices.best_track(self.config)

    def peak_memory_bytes(self) -> dict[int, int]:
        return gpus.peaks(self._device) or {0: peak_resident_bytes()}

    def close(self) -> None:
        keras.config.set_floatx("float32")

    def _inputs(self, batch: Batch) -> Any:
        return self._inputs_of(batch.micro_batches(1)[0], batch.step)

    def _inputs_of(self, rows: MicroBatch, step: int) -> Any:
        if not self.config.model.dropout:
            return (rows.inputs,)
        # Keras cuts every input by rows, so the one key comes once for each of them: (B,).
        key = np.full(len(rows.samples), step_key(self.config.train.seed, step), np.int64)
        return rows.inputs, key, rows.samples.astype(np.int64)

    def _in_order(self, found: Arrays) -> Arrays:
        return {name: found[name] for name in parameter_shapes(self.config.model)}


def build_baseline(config: RunConfig) -> Engine:
    """Return the engine for `executor` = plain. Raises ValueError for what only ours does."""
    if config.executor == "native":
        raise ValueError(
            "executor = native: TensorFlow has no pipeline of its own; expected table or plain"
        )
    if config.recompute != "none":
        raise ValueError(f"recompute = {config.recompute}; executor = plain takes none")
    if config.train.dtype == "bfloat16":
        raise ValueError("dtype = bfloat16; executor = plain takes float32 or float64")
    if config.replicas > 1:
        from tf_impl.data_parallel import DataParallelEngine

        return DataParallelEngine(config)
    return PlainEngine(config)
