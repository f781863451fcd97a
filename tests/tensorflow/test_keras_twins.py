"""A `keras.Sequential` and a `GPipeModel` with the same weights, trained on the same data: they
must not part.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from tf_impl.gpipe_model import GPipeModel

L = keras.layers
B, S = 8, 6
generator = np.random.default_rng(0)
VECTORS = generator.normal(size=(B, S)).astype("float32")
SEQUENCES = generator.normal(size=(B, S, 4)).astype("float32")
TOKENS = generator.integers(1, 20, (B, S))
for padded in (SEQUENCES, TOKENS):  # micro-batches of two differ in how much of them counts
    padded[:3, 3:] = 0
    padded[5, 1:] = 0
COLUMN = generator.normal(size=(B, 1)).astype("float32")
STEPS = generator.normal(size=(B, S, 1)).astype("float32")
LABELS = generator.integers(0, 3, (B, S))
WEIGHTS = generator.uniform(0.5, 2, (B, S)).astype("float32")


class Apply(L.Layer):
    """A layer that is one function."""

    def __init__(self, function: Callable[[Any], Any], supports_masking: bool = False) -> None:
        super().__init__()
        self.function, self.supports_masking = function, supports_masking

    def call(self, x: Any) -> Any:
        return self.function(x)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Says(L.Dense):
    """A Dense that adds a loss in its call."""

    def call(self, x: Any) -> Any:
        y = super().call(x)
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(y)))
        return y


class Inner(L.Dense):
    """A Dense in a function of its own."""

    def __init__(self, units: int, wrap: Callable[[Any], Any]) -> None:
        super().__init__(units, "tanh")
        self.wrapped = wrap(lambda x: L.Dense.call(self, x))

    def call(self, x: Any) -> Any:
        return self.wrapped(x)


class Attention(L.Layer):
    """Self-attention, which masks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.supports_masking = L.MultiHeadAttention(2, 3), True

    def build(self, shape: Any) -> None:
        self.attention.build(shape, shape)

    def call(self, x: Any) -> Any:
        return x + self.attention(x, x)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Counter(L.Layer):
    """Counts its calls in training."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1.0)
        return 1.5 * x

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Adds(L.Layer):
    """Adds to the loss what `function` makes of its input."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        self.add_loss(self.function(x))
        return x


def residual(width: int) -> keras.Model:
    """A functional model: it has its weights already."""
    start = keras.Input((width,))
    return keras.Model(start, L.Add()([start, L.Dense(width, "tanh")(start)]))


def one_weight_twice() -> list[L.Layer]:
    shared = L.Dense(4, "tanh")
    return [
        L.Dense(4),
        *(keras.Sequential([shared, L.Activation("tanh")]) for _ in range(2)),
        residual(4),
        L.Dense(1),
    ]


def nested_loops(x: tf.Tensor) -> tf.Tensor:
    def body(i: tf.Tensor, h: tf.Tensor) -> Any:
        mapped = tf.cond(i > 0, lambda: tf.map_fn(lambda row: tf.tanh(row), h), lambda: 1.1 * h)
        return i + 1, mapped

    return tf.while_loop(lambda i, h: i < 2, body, (0, x))[1]


@tf.custom_gradient
def doubled_gradient(x: tf.Tensor) -> Any:
    return tf.sin(x), lambda dy: 2 * dy * tf.cos(x)


def embedded(*layers: L.Layer, **options: Any) -> list[L.Layer]:
    return [L.Embedding(20, 4, mask_zero=True, **options), *layers]


def fitted(
    model: keras.Model, x: Any, y: Any, loss: Any, options: dict[str, Any], sizes: Sequence[int]
) -> list[Any]:
    """Losses and metrics of a step with each batch size, of an evaluation, a prediction and the
    weights.
    """
    # Many small models: faster so.
    eager = {"run_eagerly": True} if isinstance(model, keras.Sequential) else {}
    metrics = {name: given for name, given in options.items() if name != "sample_weight"}
    model.compile(keras.optimizers.SGD(0.05), loss, **metrics, **eager)
    weight = options.get("sample_weight")
    found: list[Any] = []
    for rows in sizes:
        gc.collect()
        given = {
            "sample_weight": None if weight is None else weight[:rows],
            "batch_size": rows,
            "verbose": 0,
        }
        history = model.fit(x[:rows], y[:rows], shuffle=False, **given).history
        found += [np.array(values) for values in history.values()]
    gc.collect()
    found.append(np.array(model.evaluate(x, y, sample_weight=weight, batch_size=B, verbose=0)))
    return [*found, model.predict(x, batch_size=B, verbose=0), *model.get_weights()]


def cross_entropy(**options: Any) -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


CASES: dict[str, tuple[Callable[[], list[L.Layer]], Any, Any, Any, dict[str, Any]]] = {
    "recurrent": (
        lambda: [
            L.Dense(4),
            L.Bidirectional(L.GRU(3, return_sequences=True)),
            L.LSTM(4),
            L.Dense(1),
        ],
        *(SEQUENCES, COLUMN, "mse", {}),
    ),
    "loops": (
        lambda: [L.Dense(5), Apply(nested_loops), L.Dense(4), L.Dense(1)],
        VECTORS,
        np.sign(COLUMN),
        "hinge",
        {},
    ),
    "inner functions": (
        lambda: [
            Inner(5, tf.function),
            Inner(4, lambda f: tf.function(f, jit_compile=True)),
            Apply(doubled_gradient),
            Inner(3, tf.recompute_grad),
            L.Dense(1),
        ],
        *(VECTORS, COLUMN, "mse", {}),
    ),
    "masked": (
        lambda: embedded(
            L.LSTM(4, return_sequences=True), L.TimeDistributed(L.Dense(3)), L.Dense(1)
        ),
        *(TOKENS, STEPS, "mse", {"metrics": ["mae"], "sample_weight": WEIGHTS}),
    ),
    "masked attention": (
        lambda: embedded(
            Attention(), L.LayerNormalization(), L.GlobalAveragePooling1D(), L.Dense(1)
        ),
        *(TOKENS, COLUMN, "mse", {}),
    ),
    "masked by values": (
        lambda: [
            L.Dense(4, "relu", use_bias=False),
            L.Masking(),
            L.LSTM(4, return_sequences=True),
            L.Dense(1),
        ],
        *(SEQUENCES, STEPS, "mse", {}),
    ),
    "masked in a nested model": (
        lambda: [
            keras.Sequential(embedded(L.Dense(4))),
            keras.Sequential([L.LSTM(3, return_sequences=True)]),
            L.Dense(1),
        ],
        *(TOKENS, STEPS, "mse", {}),
    ),
    "masked, with labels that do not count": (
        lambda: embedded(L.Dense(4), L.Dense(3)),
        *(TOKENS, LABELS, cross_entropy(ignore_class=1), {"weighted_metrics": ["accuracy"]}),
    ),
    "layers' own losses": (
        lambda: [
            L.Dense(5, activity_regularizer="l2", kernel_regularizer="l1"),
            L.ActivityRegularization(0.1, 0.2),
            keras.Sequential([Says(4), L.Dense(3, bias_regularizer="l2")]),
            L.Dense(1, activity_regularizer="l2"),
        ],
        *(VECTORS, COLUMN, "mse", {"metrics": ["mae"]}),
    ),
    "masked, with layers' own losses": (
        lambda: embedded(
            L.LSTM(4, return_sequences=True, activity_regularizer="l2"), Says(3), L.Dense(1)
        ),
        *(TOKENS, STEPS, keras.losses.MeanSquaredError(reduction="sum"), {}),
    ),
    "losses that are sums over samples": (
        lambda: [
            L.Dense(4, kernel_regularizer="l2"),
            keras.Sequential(
                [L.Dropout(0.0), Adds(lambda x: [0.1 * tf.reduce_sum(x**2), tf.reduce_mean(x**2)])]
            ),
            Adds(lambda x: 0.1 * tf.reduce_mean(x**2, axis=1)),
            L.Dense(1, activity_regularizer="l2"),
        ],
        *(VECTORS, COLUMN, "mse", {}),
    ),
    "shared and with weights already": (one_weight_twice, VECTORS, COLUMN, "mse", {}),
    "integers first": (
        lambda: [L.Reshape((S, 1)), L.Flatten(), L.Embedding(20, 4), L.Flatten(), L.Dense(1)],
        *(TOKENS, COLUMN, "mse", {}),
    ),
}

SIZES = {
    name: (B, B, B // 2) if name in ("recurrent", "masked attention") else (B, B) for name in CASES
}
"""Batch sizes of the steps: with some, one that was not traced yet."""

RUNS: list[tuple[str, int, dict[str, Any]]] = [
    ("recurrent", 2, {"schedule": "zb-h1", "recompute": "full"}),
    ("recurrent", 3, {"schedule": "1f1b", "partition": [1, 2]}),
    ("loops", 2, {"schedule": "gpipe"}),
    ("loops", 2, {"schedule": "interleaved", "num_chunks": 2, "recompute": "full"}),
    ("inner functions", 3, {"schedule": "zb-h1"}),
    ("inner functions", 2, {"schedule": "1f1b", "recompute": "every-1"}),
    *(("masked", 2, {"schedule": "1f1b", "partition": [k]}) for k in (1, 2, 3)),
    ("masked", 2, {"schedule": "zb-v", "num_chunks": 2, "recompute": "full"}),
    ("masked attention", 3, {"schedule": "zb-h1"}),
    ("masked by values", 2, {"schedule": "1f1b", "partition": [1]}),
    ("masked by values", 2, {"schedule": "1f1b", "partition": [2], "recompute": "every-1"}),
    ("masked in a nested model", 2, {"schedule": "gpipe"}),
    ("masked, with labels that do not count", 2, {"schedule": "gpipe"}),
    ("layers' own losses", 2, {"schedule": "interleaved", "num_chunks": 2}),
    ("layers' own losses", 1, {"schedule": "gpipe", "recompute": "every-2"}),
    ("masked, with layers' own losses", 3, {"schedule": "zb-h1", "recompute": "full"}),
    ("integers first", 2, {"schedule": "1f1b", "partition": [3], "recompute": "every-1"}),
    ("losses that are sums over samples", 2, {"schedule": "zb-h1", "recompute": "full"}),
    ("shared and with weights already", 2, {"schedule": "1f1b", "partition": [3]}),
]


@functools.cache
def plain(name: str) -> tuple[list[Any], list[Any]]:
    """The weights that a case starts from, and what `keras.Sequential` makes of them."""
    make, x, y, loss, options = CASES[name]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(make())
    model.build(x.shape)
    return model.get_weights(), fitted(model, x, y, loss, options, SIZES[name])


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize(("name", "stages", "cut"), RUNS)
def test_a_pipeline_gives_what_keras_gives(name: str, stages: int, cut: dict[str, Any]) -> None:
    make, x, y, loss, options = CASES[name]
    start, expected = plain(name)
    model = GPipeModel(make(), stages, 4, **cut)
    model.build(x.shape, keras.backend.standardize_dtype(x.dtype))
    model.set_weights(start)
    model(x[: B // 4])  # traced on this thread, and run on the stages' threads
    for found, right in zip(fitted(model, x, y, loss, options, SIZES[name]), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_layers_alone_add_to_the_loss(labels: bool) -> None:
    """By a layer's call on the first stage, by a regularizer on the second."""
    given = (VECTORS, COLUMN) if labels else (VECTORS,)
    found = []
    for pipeline in (False, True):
        keras.utils.set_random_seed(3)
        layers = [Says(5), L.Dense(1, kernel_regularizer="l2")]
        model = GPipeModel(layers, 2, 3) if pipeline else keras.Sequential(layers)
        model.build((None, S))
        model.compile("sgd", loss=None)
        losses = model.fit(*given, epochs=3, batch_size=B, verbose=0).history["loss"]
        found.append([*losses, model.evaluate(*given, batch_size=B, verbose=0)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] < found[0][0]


def test_a_dropped_model_leaves_no_function_behind() -> None:
    def train() -> list[weakref.ref[Any]]:
        make, x, y, loss, _ = CASES["masked, with layers' own losses"]
        model = GPipeModel(make(), 2, 4, recompute="full")
        model.compile("sgd", loss)
        model.fit(x, y, batch_size=B, verbose=0)
        model.evaluate(x, y, batch_size=B, verbose=0)
        return [weakref.ref(model), *(weakref.ref(layer) for layer in model.units)]

    left = []
    for _ in range(2):
        references = train()
        gc.collect()
        assert not any(reference() for reference in references)
        left.append(len(context.context().list_function_names()))
    assert left[0] == left[1]


def stateful_layers() -> list[L.Layer]:
    return [
        L.Dense(4),
        L.BatchNormalization(name="norm"),
        L.Dropout(0.5),
        Counter(name="counter"),
        L.Dense(1),
    ]


def test_states_are_updated_once_per_micro_batch_and_named() -> None:
    """Recomputation begins with the same seeds and averages, and leaves them alone."""
    trained = []
    for stages, cut in (
        (1, {}),
        (3, {"schedule": "zb-h1", "recompute": "full"}),
        (2, {"recompute": "every-1"}),
    ):
        keras.utils.set_random_seed(0)
        model = GPipeModel(stateful_layers(), stages, 4, **cut)
        model.build(VECTORS.shape)
        start = model.get_weights()
        with pytest.warns(
            UserWarning, match="norm, counter: updated with every micro-batch, so 4 times a step"
        ):
            model.compile(keras.optimizers.SGD(0.05), "mse")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            model.compile(keras.optimizers.SGD(0.05), "mse")
            model.fit(VECTORS, COLUMN, batch_size=B, epochs=2, shuffle=False, verbose=0)
        assert model.units[3].calls.numpy() == 2 * 4
        trained.append(model.get_weights())
        dense, norm = L.Dense(4), L.BatchNormalization()
        pair = keras.Sequential([dense, norm])
        pair.build(VECTORS.shape)
        pair.set_weights(start[:6])
        model.set_weights(start)
        model.forward_backward(VECTORS, COLUMN)
        for piece in np.split(VECTORS, 4):
            pair(piece, training=True)
        np.testing.assert_allclose(model.get_weights()[4], norm.moving_mean, rtol=1e-6, atol=1e-7)
    for found in trained[1:]:
        for value, right in zip(found, trained[0], strict=True):
            np.testing.assert_allclose(value, right, rtol=2e-5, atol=2e-6)


def python(x: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(tf.py_function(lambda t: 2 * t, [x], tf.float32), x.shape)


def noisy(x: tf.Tensor) -> tf.Tensor:
    return x + tf.random.normal(tf.shape(x))


@pytest.mark.parametrize(
    ("layers", "options", "text"),
    [
        (
            lambda: [L.Dense(4), L.LSTM(4, stateful=True)],
            {},
            "is stateful, so a micro-batch would begin where",
        ),
        (
            lambda: [L.Dense(4), Apply(python), L.Dense(1)],
            {},
            "tf.py_function needs of one call only",
        ),
        (
            lambda: [L.Dense(4), Apply(noisy)],
            {"recompute": "full"},
            "a second forward would do so again",
        ),
        (
            lambda: [L.Dense(4), L.SpectralNormalization(L.Dense(4))],
            {"recompute": "full"},
            "assigns what is trained",
        ),
        (
            lambda: [L.Lambda(lambda x: [x, x]), L.Add()],
            {},
            "its output is a list; expected one tensor",
        ),
        (lambda: [L.Dense(4), Adds(tf.math.reduce_std)], {}, "not known to be the sum or the mean"),
        (
            one_weight_twice,
            {"partition": [2]},
            "layers of two virtual stages share the variable .*kernel",
        ),
    ],
)
def test_layers_that_cannot_be_right_are_refused(
    layers: Callable[[], list[L.Layer]], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        GPipeModel(layers(), 2, 4, **options).build(VECTORS.shape)


def test_integers_are_not_handed_on() -> None:
    layers = [L.Reshape((S, 1)), L.Flatten(), L.Embedding(20, 4)]
    with pytest.raises(ValueError, match="its output is int64, which has no gradient"):
        GPipeModel(layers, 2, 4).build(TOKENS.shape, "int64")
