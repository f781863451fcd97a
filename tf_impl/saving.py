"""The configuration of a row of layers, for `.keras` files and `from_config`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from common.schedule.action import Schedule, parse_schedule


def layer_configs(layers: Sequence[keras.layers.Layer]) -> list[dict[str, Any]]:
    return [unbuilt(keras.saving.serialize_keras_object(layer)) for layer in layers]


def layers_of(configs: Sequence[dict[str, Any]], custom_objects: dict[str, Any] | None) -> list[keras.layers.Layer]:
    """New layers without weights: a pipeline makes those on the devices of its stages."""
    return [keras.saving.deserialize_keras_object(config, custom_objects) for config in configs]


def unbuilt(config: Any) -> Any:
    """`config` without what would make Keras build a layer when it is read, in nested layers too."""
    if isinstance(config, list | tuple):
        return [unbuilt(entry) for entry in config if not _is_input(entry)]
    if isinstance(config, dict):
        return {k: unbuilt(v) for k, v in config.items() if k not in ("build_config", "build_input_shape")}
    return config


def schedule_text(schedule: str | Schedule) -> str:
    """A name, or the text form: what `file:PATH` said may not be there when it is read again."""
    return str(schedule) if isinstance(schedule, Schedule) else schedule


def schedule_of(text: str) -> str | Schedule:
    return parse_schedule(text) if "\n" in text else text


def _is_input(config: Any) -> bool:
    return isinstance(config, dict) and config.get("class_name") == "InputLayer"
