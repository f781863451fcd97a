"""TensorFlow in the tests of every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from common.spec.data import IGNORED
from common.spec.run import TransformerSpec
from tests.every_framework import *  # noqa: F403
from tests.every_framework import Array, Logits, Loss
from tf_impl import convert
from tf_impl.gpipe_model import GPipeModel


@pytest.fixture
def framework() -> str:
    return "tensorflow"


@pytest.fixture
def loss() -> Loss:
    def of_logits(logits: Array, targets: Any) -> tuple[float, Array]:
        model = GPipeModel([keras.layers.Identity()], num_stages=1, num_micro_batches=1)
        # With its dtype, as the engine's: Keras' losses cast to theirs, which is float32 unless it
        # is said.
        options = {"ignore_class": IGNORED, "dtype": str(logits.dtype)}
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True, **options))
        x = tf.constant(logits)
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = model.summed_loss(x, tf.constant(targets), tf.constant(3))
        return float(found), tape.gradient(found, x).numpy()

    return of_logits


@pytest.fixture
def logits() -> Logits:
    def of_file(spec: TransformerSpec, file: Path, tokens: Any) -> Any:
        model = convert.plain_model(spec, "float64")
        model.load_weights(file)
        return model.predict(tokens, verbose=0)

    return of_file
