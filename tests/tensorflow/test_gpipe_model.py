"""`GPipeModel` as a Keras user has it: beside `keras.Sequential` with the same layers, and what it
refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from common.runtime.executor import StageFailure
from common.schedule.action import Action, Op, ScheduleError, parse_schedule
from common.schedule.generators import make_schedule
from common.spec.run import TransformerSpec
from tests.engines import Make, batch
from tf_impl.gpipe_model import GPipeModel

SAMPLES, FEATURES, CLASSES = 48, 6, 5
ONES, ZEROS = np.ones((10, FEATURES), np.float32), np.zeros(10, np.int64)


def layers() -> list[keras.layers.Layer]:
    """Sizes that differ, and one layer without weights."""
    return [
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dense(12),
        keras.layers.Activation("tanh"),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(CLASSES),
    ]


def data(batch: int) -> tf.data.Dataset:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    y = generator.integers(0, CLASSES, SAMPLES)
    weight = generator.uniform(0.5, 2.0, SAMPLES).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(batch)


def compiled(model: keras.Model) -> keras.Model:
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.9)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_keras_user_gets_what_plain_keras_gives(schedule: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)  # Adam turns the sign of a gradient near 0 into a step
    plain = compiled(keras.Sequential([keras.Input((FEATURES,)), *layers()]))
    model = compiled(GPipeModel(layers(), num_stages=3, num_micro_batches=4, schedule=schedule))
    model.build((None, FEATURES))
    model.set_weights(plain.get_weights())
    epochs: list[int] = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    # 20 samples: neither 48 nor 4 equal pieces.
    options: dict[str, Any] = {"epochs": 3, "verbose": 0, "validation_data": data(20)}
    history = model.fit(data(16), callbacks=[callback], **options).history
    expected = plain.fit(data(16), **options).history
    assert set(history) == set(expected) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=0, atol=2e-6, err_msg=name)
    assert epochs == [0, 1, 2] and history["loss"][-1] < history["loss"][0]
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)
    scores = (one.evaluate(data(20), verbose=0) for one in (model, plain))
    np.testing.assert_allclose(*scores, rtol=0, atol=2e-6)
    prediction = model.predict(data(20), verbose=0)
    np.testing.assert_allclose(prediction, plain.predict(data(20), verbose=0), rtol=0, atol=1e-5)
    assert [chunk.weights[0].variable.value.device[-5:] for chunk in model.chunks] == [
        "CPU:0",
        "CPU:1",
        "CPU:2",
    ]

    model.save_weights(tmp_path / "model.weights.h5")
    # With as many micro-batches, since predictions go through in micro-batches too.
    other = GPipeModel(layers(), num_stages=2, num_micro_batches=4)
    other.build((None, FEATURES))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(prediction, other.predict(data(20), verbose=0))


def test_a_seed_on_another_device_neither_hangs_nor_stands_still(make: Make) -> None:
    """A Keras Dropout on the second device has its seed on the first one; the engine's stages are
    alone.
    """
    with_seed = [keras.layers.Dense(8), keras.layers.Dropout(0.5), keras.layers.Dense(CLASSES)]
    model = compiled(GPipeModel(with_seed, 2, 2, partition=[1]))
    assert model.forward_backward(ONES[:4], ZEROS[:4]) != model.forward_backward(
        ONES[:4], ZEROS[:4]
    )
    engine = make(2, dropout=0.1, tied_head=True)
    engine.forward_backward(batch(engine))
    alone = [[chunk.only_own_device for chunk in m.chunks] for m in (model, engine.model)]
    assert alone == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (
            lambda: GPipeModel(layers(), 2, 4).forward_backward(ONES, ZEROS),
            RuntimeError,
            r"compile\(optimizer, loss\)",
        ),
        (
            lambda: compiled(GPipeModel(layers(), 2, 4)).forward_backward(ONES[:3], ZEROS[:3]),
            ValueError,
            "3 samples cannot be cut into 4",
        ),
        (lambda: GPipeModel(layers(), 6, 4), ValueError, "6 virtual stages for 5 layers"),
        (lambda: GPipeModel(layers(), 4, 4), ValueError, r"tf_impl.devices.configure\(stages=4\)"),
        (
            lambda: GPipeModel(layers(), 3, 4, partition=[3, 3]),
            ValueError,
            "2 increasing boundaries",
        ),
        (
            lambda: GPipeModel(layers(), 2, 4, make_schedule("gpipe", 3, 4)),
            ScheduleError,
            "has 3 devices and 4 micro-batches; expected 2 and 4",
        ),
        (
            lambda: GPipeModel(layers(), 2, 1, parse_schedule("F0 BW0\nBW0 F0")),
            ScheduleError,
            "breaks 1 rules",
        ),
        (
            lambda: GPipeModel(TransformerSpec(num_layers=1), 4, 4),
            ValueError,
            "4 virtual stages for 3 layers",
        ),
    ],
    ids=[
        "not compiled",
        "batch",
        "stages",
        "devices",
        "partition",
        "sizes",
        "order",
        "Transformer",
    ],
)
def test_errors_say_what_is_wrong(
    work: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        work()


def test_a_failing_stage_ends_the_step_with_its_own_error_and_the_model_runs_again() -> None:
    model = compiled(GPipeModel(layers(), 3, 2, schedule="1f1b"))

    def fail(device: int, action: Action | None) -> None:
        if action == Action(Op.BW, 1):
            raise MemoryError("no memory left")

    model.on_action = fail
    with pytest.raises(StageFailure, match="no memory left"):
        model.forward_backward(ONES, ZEROS)
    model.on_action = lambda device, action: None
    assert np.isfinite(model.forward_backward(ONES, ZEROS))
