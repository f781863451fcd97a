"""How a row of layers is written and read; slots are variables of its one optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from common.schedule.action import Schedule, parse_schedule
from common.spec.run import TransformerSpec
from tf_impl.keras_pipeline.chunk import Chunk, Weight


class SavedRow(keras.Model):
    """The part of a `GPipeModel` that Keras' saving asks."""

    chunks: list[Chunk]
    _options: dict[str, Any]
    """What the model was made with, but for its layers."""

    def get_config(self) -> dict[str, Any]:
        serialized = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "spec": self.spec and self.spec.model_dump(),
            "layers": [] if self.spec else [serialized(layer) for layer in self.units],
            "input": None if self._input is None else [list(self._input.shape), self._input.dtype],
            **self._options,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Any:
        """Return a model with new weights, as Sequential's; built if the other one was."""
        config = dict(config)
        spec, layers, start, trainable = (
            config.pop(key) for key in ("spec", "layers", "input", "trainable")
        )
        if "\n" in config["schedule"]:
            config["schedule"] = parse_schedule(config["schedule"])
        make = keras.saving.deserialize_keras_object
        row = TransformerSpec(**spec) if spec else [make(one, custom_objects) for one in layers]
        # Devices are not saved: the model is made for those that are configured here.
        model = cls(row, **config)
        if start:
            model.build(*start)
        if not trainable:
            model.trainable = False
        return model

    def get_build_config(self) -> None:
        """None: the configuration says what the input is like."""

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self._build_optimizer()  # its slots are loaded next

    def export(self, *arguments: Any, **options: Any) -> None:
        """Refused: what is exported is one graph, and a pipeline is Python that calls many."""
        raise ValueError(
            "a pipeline cannot be exported; expected a keras.Sequential of new layers with the "
            "same weights"
        )

    def save_own_variables(self, store: Any) -> None:
        """The float32 masters, if layers compute in bfloat16."""
        # Under numbers, in the order of the layers: a master's own name is the copy's.
        for i, (_, master, _) in enumerate(self._copies):
            store[str(i)] = master.numpy()

    def load_own_variables(self, store: Any) -> None:
        for i, (_, master, _) in enumerate(self._copies):
            if str(i) in store:
                master.assign(store[str(i)])

    def load_weights(self, *arguments: Any, **options: Any) -> None:
        """As `keras.Model.load_weights`."""
        super().load_weights(*arguments, **options)
        self._follow_weights()

    def set_weights(self, weights: Any) -> None:
        """As `keras.Model.set_weights`."""
        super().set_weights(weights)
        self._follow_weights()

    @property
    def _copies(self) -> list[Weight]:
        """Those that the layers have less precisely than the optimizer."""
        return [weight for chunk in self.chunks for weight in chunk.copies]

    def _follow_weights(self) -> None:
        """Makes the masters of weights that were set; one that rounds to its weight was set too."""
        for variable, master, _ in self._copies:
            # A file with masters sets the copy as well, and rounding it again changes nothing.
            value = tf.convert_to_tensor(variable)
            if bool(tf.reduce_any(tf.cast(tf.convert_to_tensor(master), value.dtype) != value)):
                master.assign(tf.cast(value, tf.float32))


def schedule_text(schedule: str | Schedule) -> str:
    """Return a name, or the text of a schedule, whose file may be gone when it is read."""
    return str(schedule) if isinstance(schedule, Schedule) else schedule
