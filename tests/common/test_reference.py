"""The oracle against finite differences: every parameter and variant, with dropout."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from common.oracle.reference import Oracle, clip_scale, global_norm, pieces_of, saved_bytes
from common.runtime.rounded_oracle import RoundedOracleEngine
from common.spec.data import load_corpus
from common.spec.parameters import initial_weights, random_arrays
from common.spec.rounding import in_precision
from common.spec.run import RunConfig, TrainSpec, TransformerSpec

VARIANTS = [
    {"norm": norm, "activation": activation, "tied_head": tied}
    for norm, activation, tied in itertools.product(
        ("pre", "post"), ("gelu", "gelu_tanh", "relu", "swiglu"), (False, True)
    )
]
LLAMA = {"norm_kind": "rms", "position": "rotary", "activation": "swiglu", "biases": False}
VARIANTS += [
    LLAMA | {"num_kv_heads": 2},
    LLAMA | {"norm": "post", "biases": True, "rope_theta": 50.0},
    {"num_kv_heads": 1, "biases": False},
    {"norm_kind": "rms", "tied_head": True},
    {"position": "rotary", "num_kv_heads": 1},
    {"causal": False, "norm": "post"},
    {"causal": False, "tied_head": True} | LLAMA,
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_equal_finite_differences(variant: dict[str, Any]) -> None:
    model = TransformerSpec.model_validate(
        {
            "num_layers": 2,
            "d_model": 8,
            "num_heads": 4,
            "d_ff": 10,
            "context_length": 5,
            "dropout": 0.2,
        }
        | variant
    )
    weights, noise = initial_weights(model, 0, "float64"), random_arrays(model, 1, "float64", 0.3)
    oracle = Oracle(model, TrainSpec(), {name: weights[name] + noise[name] for name in weights})
    config = RunConfig(model=model, train=TrainSpec(batch_size=4))
    batch = load_corpus(config).training_batch(config, 0)
    oracle.forward_backward(batch)
    directions = random_arrays(model, 2, "float64", 1.0)
    for name, direction in directions.items():
        weight, losses = oracle.weights[name].copy(), []
        for distance in (1e-5, -1e-5):
            oracle.weights[name] = weight + distance * direction
            losses.append(oracle.forward(batch)[0])
        oracle.weights[name] = weight
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(
            float((oracle.gradients[name] * direction).sum()), rel=2e-6, abs=1e-9
        ), name


def test_an_encoder_sees_what_follows_and_a_causal_model_does_not() -> None:
    for causal in (True, False):
        model = TransformerSpec(num_layers=1, d_model=8, num_heads=2, d_ff=8, causal=causal)
        oracle = Oracle(model, TrainSpec(), initial_weights(model, 0, "float64"))
        batch = load_corpus(RunConfig()).batch(0, 0, 2, 6)
        before = oracle.forward(batch)[1]["head"]
        batch.inputs[:, -1] += 1
        first = np.abs(oracle.forward(batch)[1]["head"] - before)[:, 0]
        assert (first.max() == 0) == causal


def test_training_learns_the_text() -> None:
    config = RunConfig(
        model=TransformerSpec(num_layers=1, d_model=16, num_heads=2, d_ff=32, context_length=8)
    )
    corpus = load_corpus(config)
    oracle = Oracle(config.model, config.train, initial_weights(config.model, 0, "float64"))
    losses = [oracle.train_step(corpus.batch(step, 0, 16, 8)) for step in range(60)]
    assert losses[0] == pytest.approx(np.log(256), rel=0.01)
    assert np.mean(losses[-5:]) < losses[0] - 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_optimizers_by_hand(optimizer: str) -> None:
    model = TransformerSpec(num_layers=1, d_model=2, num_heads=1, d_ff=2, context_length=2)
    train = TrainSpec.model_validate(
        {
            "optimizer": optimizer,
            "learning_rate": 0.5,
            "weight_decay": 0.25,
            "momentum": 0.5,
            "clip_norm": None,
            "beta1": 0.5,
            "beta2": 0.75,
            "epsilon": 2.0**-20,
        }
    )
    name = "block.0.attention.query.weight"
    oracle = Oracle(model, train, initial_weights(model, 0, "float64"))
    start = oracle.weights[name].copy()
    oracle.gradients = {key: np.full_like(value, 2.0) for key, value in oracle.weights.items()}
    oracle.apply_gradients(0)
    if optimizer == "adamw":  # m_hat = 2, v_hat = 4: the first step is the sign of the gradient
        expected = start * (1 - 0.5 * 0.25) - 0.5 * 2 / (2 + 2.0**-20)
    else:
        expected = start - 0.5 * (2 + 0.25 * start)
    np.testing.assert_allclose(oracle.weights[name], expected, rtol=1e-15)


def test_clipping() -> None:
    assert global_norm([9.0, 16.0]) == 5.0
    assert (
        clip_scale(5.0, 1.0) == 0.2 and clip_scale(0.5, 1.0) == 1.0 and clip_scale(5.0, None) == 1.0
    )
    pieces = list(np.random.default_rng(0).lognormal(0, 9, 50))
    assert global_norm(pieces) == global_norm(pieces[::-1])


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_nothing(tied: bool) -> None:
    """Rows without a label add nothing: the gradient is that of the mini-batch without them."""
    model = TransformerSpec(
        num_layers=1, d_model=8, num_heads=2, d_ff=12, context_length=6, dropout=0.2, tied_head=tied
    )
    config = RunConfig(model=model, train=TrainSpec(batch_size=8), sequences_per_epoch=5)
    oracle = Oracle(model, config.train, initial_weights(model, 0, "float64"))
    batch = load_corpus(config).training_batch(config, 0)
    padded, gradients = oracle.forward_backward(batch), oracle.gradients
    assert oracle.forward_backward(batch.first(5)) == pytest.approx(padded, rel=1e-15)
    for name, gradient in oracle.gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-12, atol=1e-18, err_msg=name)


def test_units_alone_give_the_gradients_of_the_whole() -> None:
    model = TransformerSpec(
        num_layers=2, d_model=8, num_heads=2, d_ff=12, context_length=6, dropout=0.2, tied_head=True
    )
    oracle = Oracle(model, TrainSpec(), initial_weights(model, 0, "float64"))
    batch = load_corpus(RunConfig()).batch(0, 0, 4, 6)
    oracle.forward_backward(batch)
    _, outputs, _ = oracle.forward(batch)
    total, before = {name: np.zeros_like(value) for name, value in oracle.weights.items()}, None
    for unit, output in outputs.items():
        mine, _, gradients = oracle.probe_unit(batch, unit, before, oracle.output_gradients[unit])
        np.testing.assert_array_equal(mine, output)
        before = output
        for name, gradient in gradients.items():
            total[name] += gradient
    for name, gradient in oracle.gradients.items():
        np.testing.assert_allclose(total[name], gradient, rtol=1e-12, atol=1e-18, err_msg=name)


def test_the_rounded_oracle_computes_at_rounded_weights_and_trains_their_masters() -> None:
    config = RunConfig(
        model=TransformerSpec(num_layers=1, d_model=16, num_heads=2, d_ff=32, context_length=8)
    )
    weights, batch = (
        initial_weights(config.model, 0, "float64"),
        load_corpus(config).batch(0, 0, 4, 8),
    )
    engine = RoundedOracleEngine(config)
    engine.reset(weights)
    plain = Oracle(
        config.model, config.train, {k: in_precision(w, "bfloat16") for k, w in weights.items()}
    )
    assert engine.forward_backward(batch) == plain.forward_backward(batch)
    assert engine.evaluate(batch) == plain.forward(batch, training=False)[0]
    assert all(np.array_equal(g, plain.gradients[name]) for name, g in engine.gradients().items())
    assert all(np.array_equal(w, weights[name]) for name, w in engine.weights().items())
    before = engine.evaluate(batch)
    engine.apply_gradients(0)
    assert engine.evaluate(batch) < before


def test_a_large_mini_batch_goes_through_in_pieces() -> None:
    model = TransformerSpec(
        num_layers=1, d_model=8, num_heads=2, d_ff=12, context_length=8, dropout=0.2, tied_head=True
    )
    train = {"batch_size": 7, "micro_batches": 2}
    config = RunConfig.model_validate(
        {"model": model, "train": train, "sequence_lengths": "random", "sequences_per_epoch": 6}
    )
    batch, weights = (
        load_corpus(config).training_batch(config, 0),
        initial_weights(model, 0, "float64"),
    )
    whole = Oracle(model, config.train, weights)
    loss = whole.forward_backward(batch)
    assert pieces_of(model, 7) == 1
    for count in (2, 3, 7):  # the last of 7 pieces has no target
        piece_bytes = saved_bytes(model, -(-7 // count))
        assert pieces_of(model, 7, piece_bytes) == count
        pieces = Oracle(model, config.train, weights, piece_bytes=piece_bytes)
        assert pieces.forward_backward(batch) == pytest.approx(loss, rel=1e-14)
        for name, gradient in whole.gradients.items():
            np.testing.assert_allclose(
                pieces.gradients[name], gradient, rtol=1e-11, atol=1e-17, err_msg=name
            )
        assert pieces.evaluate(batch) == pytest.approx(whole.evaluate(batch), rel=1e-14)
