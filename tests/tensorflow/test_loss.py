"""The loss where logits lie far apart."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from common.spec.data import IGNORED
from tests.extreme import EXTREME_LOGITS, check_loss
from tf_impl.gpipe_model import GPipeModel


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXTREME_LOGITS)
def test_the_loss_of_extreme_logits_is_right(name: str, dtype: str) -> None:
    model = GPipeModel([keras.layers.Identity()], num_stages=1, num_micro_batches=1)
    # With its dtype, as the engine's: Keras' losses cast to theirs, which is float32 unless it is
    # said.
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(True, ignore_class=IGNORED, dtype=dtype)
    )

    def loss(
        logits: NDArray[np.floating], targets: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.floating]]:
        x = tf.constant(logits)
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = model.summed_loss(x, tf.constant(targets), tf.constant(3))
        return float(found), tape.gradient(found, x).numpy()

    check_loss(loss, name, dtype)
