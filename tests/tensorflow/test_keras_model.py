"""A `GPipeModel` beside the `keras.Sequential` of the same layers, weights and data: trained and
saved alike.

Eight samples in three micro-batches, so that the pieces differ: 3, 3, 2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_impl.gpipe_model import GPipeModel

L, losses, optimizers = keras.layers, keras.losses, keras.optimizers
GENERATOR = np.random.default_rng(0)
B, S, CLASSES = 8, 4, 3
X = GENERATOR.normal(size=(B, 5)).astype("float32")
SEQUENCES = GENERATOR.normal(size=(B, S, 5)).astype("float32")
COLUMN = GENERATOR.normal(size=(B, 1)).astype("float32")
LABELS = GENERATOR.integers(0, CLASSES, B)
WEIGHT = GENERATOR.uniform(0.2, 2.0, B)
# 0 behind the end.
TOKENS = GENERATOR.integers(1, 9, (B, S)) * (np.arange(S) < GENERATOR.integers(1, S + 1, (B, 1)))
OF_TOKENS = GENERATOR.integers(0, CLASSES, (B, S))
PER_TOKEN = GENERATOR.uniform(0.2, 2.0, (B, S))

Layers = Callable[[], list[Any]]


def regression() -> list[Any]:
    return [L.Dense(4, "tanh"), L.Dense(1)]


def probability() -> list[Any]:
    return [L.Dense(4, "tanh"), L.Dense(1, "sigmoid")]


def classes() -> list[Any]:
    return [L.Dense(4, "tanh"), L.Dense(CLASSES)]


def masked() -> list[Any]:
    return [L.Embedding(9, 4, mask_zero=True), L.Dense(CLASSES)]


def pair(
    layers: Layers, x: Any, micro_batches: int = 3, **options: Any
) -> tuple[keras.Model, GPipeModel]:
    keras.utils.set_random_seed(0)
    plain, model = keras.Sequential(layers()), GPipeModel(layers(), 2, micro_batches, **options)
    plain(x[:1])
    model.build(x.shape, keras.backend.standardize_dtype(x.dtype))
    model.set_weights(plain.get_weights())
    return plain, model


def fit(model: keras.Model, x: Any, y: Any, **options: Any) -> dict[str, list[float]]:
    given = {"batch_size": B, "epochs": 2, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, **given).history


def difference(a: Any, b: Any) -> float:
    return max(
        float(np.abs(np.subtract(p, q, dtype=np.float64)).max()) for p, q in zip(a, b, strict=True)
    )


def assert_twins(plain: keras.Model, model: keras.Model) -> None:
    assert difference(plain.get_weights(), model.get_weights()) < 1e-5
    slots = ([variable.numpy() for variable in m.optimizer.variables] for m in (plain, model))
    assert difference(*slots) < 1e-5


def train_twins(
    layers: Layers, x: Any, y: Any, compiled: Callable[[], dict[str, Any]], **options: Any
) -> Any:
    twins, histories = pair(layers, x), []
    for one in twins:
        # Faster for a few steps.
        one.compile(**{"optimizer": optimizers.SGD(0.1), "run_eagerly": True} | compiled())
        histories.append(fit(one, x, y, **options))
    assert list(histories[0]) == list(histories[1])
    assert difference(histories[0].values(), histories[1].values()) < 1e-5
    assert_twins(*twins)


class SummedInside(losses.Loss):
    """Reduces by itself, whatever its `reduction`."""

    def __call__(self, y: tf.Tensor, prediction: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
        return tf.reduce_sum(tf.square(tf.cast(y, prediction.dtype) - prediction))


SPARSE = losses.SparseCategoricalCrossentropy
LOSSES: dict[str, tuple[Layers, Any, Any, Any]] = {
    "labels (B,), predictions (B, 1)": (regression, lambda y, p: tf.abs(y - p), X, COLUMN[:, 0]),
    "binary labels by name": (probability, "binary_crossentropy", X, LABELS > 1),
    "ce of labels (B, 1)": (classes, "ce", X, LABELS[:, None]),
    "smoothed": (classes, losses.CategoricalCrossentropy(True, 0.2), X, np.eye(CLASSES)[LABELS]),
    "sum": (regression, losses.MeanSquaredError("sum"), X, COLUMN),
    "a mean inside": (regression, lambda y, p: tf.reduce_mean(tf.square(y - p)), X, COLUMN),
    "a sum inside": (regression, SummedInside(), X, COLUMN),
    "ignored class": (classes, SPARSE(True, ignore_class=0), SEQUENCES, OF_TOKENS),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_is_that_of_the_whole_batch(case: str) -> None:
    layers, loss, x, y = LOSSES[case]
    train_twins(layers, x, y, lambda: {"loss": loss})


@pytest.mark.parametrize(
    ("reduction", "rank"),
    [
        ("sum", 1),
        ("mean_with_sample_weight", 1),
        ("sum_over_batch_size", 2),
        ("mean_with_sample_weight", 3),
    ],
)
def test_sample_weights_of_every_rank(reduction: str, rank: int) -> None:
    weight = WEIGHT if rank == 1 else PER_TOKEN if rank == 2 else PER_TOKEN[..., None]
    x, y = (X, LABELS) if rank == 1 else (SEQUENCES, OF_TOKENS)
    train_twins(
        classes, x, y, lambda: {"loss": SPARSE(True, reduction=reduction)}, sample_weight=weight
    )


def test_class_weights_metrics_and_the_weight_of_the_loss() -> None:
    compiled = {"loss": SPARSE(True), "loss_weights": 2.5, "weighted_metrics": ["accuracy"]}
    # One object for both twins.
    compiled["metrics"] = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    train_twins(
        classes,
        X,
        LABELS,
        lambda: compiled,
        class_weight={0: 1.0, 1: 3.0, 2: 0.5},
        validation_split=0.25,
    )


def test_batches_may_be_of_any_size() -> None:
    """In training not smaller than m."""
    twins, found = pair(regression, X, 2, schedule="zb-h1", recompute="except-last"), []
    for one in twins:
        one.compile(optimizers.SGD(0.1), "mse", metrics=["mae"], run_eagerly=True)
        fit(one, X, COLUMN, batch_size=5)
        score = one.evaluate(X, COLUMN, batch_size=7, sample_weight=WEIGHT, verbose=0)  # 7, then 1
        found.append([*score, one.predict(X, batch_size=7, verbose=0)])
    assert all(difference([a], [b]) < 1e-5 for a, b in zip(*found, strict=True))
    assert_twins(*twins)


def test_uneven_pieces_are_traced_twice_at_most() -> None:
    _, model = pair(regression, X)
    assert model(X[:1]).shape == model.predict(X[:1], verbose=0).shape  # before `compile`
    model.compile("sgd", "mse")
    fit(model, X, COLUMN)
    model.evaluate(X, COLUMN, batch_size=B, verbose=0)
    model.predict(X, batch_size=B, verbose=0)
    assert {len(set(map(id, chunk.functions))) for chunk in model.chunks} == {2}
    # One for model(x[:1]).
    assert [chunk.evaluate.experimental_get_tracing_count() for chunk in model.chunks] == [3, 3]


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw, clipped over all stages": lambda: optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.05
    ),
    "nadam": lambda: optimizers.Nadam(0.01),
    "adafactor": lambda: optimizers.Adafactor(0.01),
    "schedule": lambda: optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_is_the_one_of_one_device(case: str) -> None:
    train_twins(regression, X, COLUMN, lambda: {"optimizer": OPTIMIZERS[case](), "loss": "mse"})


@pytest.mark.parametrize("compiled_again", [False, True])
def test_trainable_takes_effect_when_keras_says(compiled_again: bool) -> None:
    twins = pair(regression, X)
    for one in twins:
        one.compile(optimizers.Adam(0.01), "mse")
        fit(one, X, COLUMN)
        one.layers[0].trainable = False
        if compiled_again:
            one.compile(optimizers.Adam(0.01), "mse")
        fit(one, X, COLUMN)
        if compiled_again:
            one.layers[0].trainable = True
            one.compile(optimizers.Adam(0.01), "mse")
            fit(one, X, COLUMN)
    assert_twins(*twins)


def build(stages: int, optimizer: Any) -> GPipeModel:
    keras.utils.set_random_seed(1)
    layers = [keras.Input((5,)), L.Dense(4), keras.Sequential([L.Dense(4, "tanh")]), L.Dense(1)]
    model = GPipeModel(layers, stages, 3, "1f1b")
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("how", ["keras file", "weights"])
def test_training_goes_on_from_a_file_bit_by_bit(how: str, tmp_path: Path) -> None:
    model = build(2, optimizers.Nadam(0.01))
    fit(model, X, COLUMN)
    if how == "keras file":
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    else:  # also to another number of stages
        model.save_weights(tmp_path / "model.weights.h5")
        other = build(3, optimizers.Nadam(0.01))
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "model.weights.h5")
    assert isinstance(other, GPipeModel)
    for one in (model, other):
        fit(one, X, COLUMN)
    assert difference(model.get_weights(), other.get_weights()) == 0
    slots = [[variable.numpy() for variable in one.optimizer.variables] for one in (model, other)]
    assert difference(*slots) == 0
    # Iterations, rate, Nadam's product; two moments.
    assert len(slots[0]) == 3 + 2 * len(model.weights)


def test_backup_and_restore_loses_nothing(tmp_path: Path) -> None:
    def interrupt(epoch: int, logs: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    whole, first, second = (build(stages, optimizers.Adam(0.01)) for stages in (2, 2, 3))
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    fit(whole, X, COLUMN, epochs=4)
    with pytest.raises(KeyboardInterrupt):
        fit(
            first,
            X,
            COLUMN,
            epochs=4,
            callbacks=[backup, keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)],
        )
    history = fit(
        second,
        X,
        COLUMN,
        epochs=4,
        callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")],
    )
    assert len(history["loss"]) == 2
    assert difference(whole.get_weights(), second.get_weights()) == 0


def test_a_model_can_be_made_again_and_looked_at() -> None:
    model = build(2, "adam")
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    assert "Total params" in "".join(lines)
    for again in (keras.models.clone_model(model), GPipeModel.from_config(model.get_config())):
        assert [weight.shape for weight in again.get_weights()] == [
            weight.shape for weight in model.get_weights()
        ]
        assert (again.count_params(), len(again.layers)) == (model.count_params(), 3)
        assert again.get_layer(index=2).name == model.layers[2].name


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_masks_and_weights_count_over_uneven_pieces(reduction: str) -> None:
    compiled = {"loss": SPARSE(True, reduction=reduction), "weighted_metrics": ["accuracy"]}
    train_twins(masked, TOKENS, OF_TOKENS, lambda: compiled, sample_weight=PER_TOKEN)


def test_data_comes_in_every_form() -> None:
    _, model = pair(regression, X)
    model.compile("sgd", "mse", run_eagerly=True, steps_per_execution=2)
    batches = tf.data.Dataset.from_tensor_slices((X, COLUMN)).batch(4)
    for data in ([X], {"x": X}):
        fit(model, data, {"y": COLUMN})
    for iterable in (batches, ((X[i : i + 4], COLUMN[i : i + 4]) for i in (0, 4))):
        model.fit(iterable, verbose=0, validation_data=batches)
    before = model.test_on_batch(X.astype("float64"), COLUMN)
    assert model.train_on_batch(X, COLUMN) == pytest.approx(before, rel=1e-6)
    assert model.test_on_batch(X, COLUMN) < before
    assert np.array_equal(model.predict_on_batch(X), model.predict(X, verbose=0))


def compiled(loss: Any = "mse", optimizer: Any = "sgd", **options: Any) -> GPipeModel:
    model = GPipeModel(regression(), 2, 3)
    model.compile(optimizer, loss, **options)
    return model


SHARED = optimizers.SGD()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no loss": (lambda: fit(compiled(None), X, COLUMN), "no layer adds a loss; expected"),
    "list of none": (lambda: compiled([None]), "0 losses; expected one"),
    "two losses": (lambda: compiled(["mse", "mae"]), "2 losses; expected one"),
    "loss by output": (lambda: compiled({"dense": "mse"}), "expected the loss itself"),
    "no reduction": (lambda: compiled(losses.MeanSquaredError(None)), "expected sum"),
    "pairs of samples": (lambda: compiled(losses.Circle()), "expected one value per sample"),
    "accumulation": (
        lambda: compiled(optimizer=optimizers.SGD(gradient_accumulation_steps=2)),
        "more micro-batches",
    ),
    "moving average": (lambda: compiled(optimizer=optimizers.Adam(use_ema=True)), "use_ema=False"),
    "loss scaling": (
        lambda: compiled(optimizer=optimizers.LossScaleOptimizer(optimizers.SGD())),
        "bfloat16",
    ),
    "XLA": (lambda: compiled(jit_compile=True), "expected 'auto' or False"),
    "spread of a batch": (
        lambda: fit(compiled(lambda y, p: tf.math.reduce_std(y - p)), X, COLUMN),
        "neither the sum",
    ),
    "weight of a sequence": (
        lambda: fit(compiled(), SEQUENCES, SEQUENCES[..., :1], sample_weight=WEIGHT),
        "expected a weight for every value",
    ),
    "another's optimizer": (
        lambda: [fit(compiled(optimizer=SHARED), X, COLUMN) for _ in range(2)],
        "for other weights",
    ),
    "few samples": (lambda: fit(compiled(), X[:2], COLUMN[:2]), "expected at least 3"),
    "no labels": (lambda: fit(compiled(), X, None), "no labels"),
    "two inputs": (lambda: fit(compiled(), [X, X], COLUMN), "x has 2 arrays; expected one"),
    "rows": (lambda: compiled().train_on_batch(X, COLUMN[:5]), "[8, 5] rows"),
    "two outputs": (
        lambda: GPipeModel([L.Dense(1), L.Lambda(lambda t: [t, t])], 2, 3)(X),
        "expected one tensor",
    ),
    "not a layer": (lambda: GPipeModel([L.Dense(1), "relu"], 2, 3), "layer 1 is a str"),
    "late input": (
        lambda: GPipeModel([L.Dense(1), keras.Input((5,))], 2, 3),
        "ahead of all layers",
    ),
    "no whole number": (
        lambda: GPipeModel(regression(), 2, 3.0),
        "num_micro_batches = 3.0; expected a whole number",
    ),
    "a boundary": (
        lambda: GPipeModel(regression(), 2, 3, partition=["1"]),
        "partition[0] = '1'; expected a whole",
    ),
    "no schedule": (lambda: GPipeModel(regression(), 2, 3, None), "schedule None; expected a name"),
    "not a device": (
        lambda: GPipeModel(regression(), 2, 3, device="tpu"),
        "device = 'tpu'; expected",
    ),
    "not a list": (lambda: GPipeModel(L.Dense(1), 2, 3), "layers is a Dense; expected a list"),
    "another's layer": (
        lambda: GPipeModel(keras.Sequential([keras.Input((5,)), L.Dense(1)]).layers, 1, 3),
        "is part of another model",
    ),
    "export": (lambda: compiled().export("folder"), "expected a keras.Sequential of new layers"),
    "one name": (
        lambda: GPipeModel([L.Dense(1, name="a"), L.Dense(1, name="a")], 2, 3),
        "called 'a'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_pipeline_cannot_do_is_refused_in_one_line(case: str) -> None:
    work, text = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        work()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
