"""Shards of a stage on devices of one process: what is where, what travels, and what is there once.

The parity ladder has them in every combination with stages and replicas.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from common.spec.data import IGNORED
from tests.engines import SAMPLES, STEP_KEY, Make, assert_within, batch, numpy_mask, oracle_of
from tf_impl.device_shards import CrossEntropy, side_by_side
from tf_impl.dropout import DropoutContext, keep_mask
from tf_impl.gpipe_model import GPipeModel
from tf_impl.stage import Stage

SECOND = "CPU:1"


def test_each_shard_is_on_its_device_and_nothing_travels_in_w(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"tensor_parallel": 2, "vocab_parallel": True}
    engine = make(1, "zb-h1", run=run, dtype="float64", dropout=0.1, num_layers=1, tied_head=True)
    given, oracle = batch(engine), oracle_of(engine)
    handed_on: list[list[bool]] = []
    """Whether each tensor that W gets is on the second device."""
    backward_input = Stage.backward_input

    def watched(stage: Stage, i: int, chunk: int, gradient: tf.Tensor | None) -> Any:
        result = backward_input(stage, i, chunk, gradient)
        handed_on.append([SECOND in t.backing_device for t in stage.waiting[i, chunk].tensors])
        return result

    monkeypatch.setattr(Stage, "backward_input", watched)
    found = {"loss": engine.forward_backward(given), "held-out loss": engine.evaluate(given)}
    expected = {"loss": oracle.forward_backward(given), "held-out loss": oracle.evaluate(given)}
    assert_within(engine.gradients(), oracle.gradients(), "gradient", "float64")
    found["norm"], expected["norm"] = engine.apply_gradients(0), oracle.apply_gradients(0)
    assert_within(found, expected, "loss", "float64")
    assert_within(engine.weights(), oracle.weights(), "trained_parameter", "float64")

    (chunk,) = engine.model.chunks
    for function in chunk.functions[0].made().values():
        graph = function.graph
        products = [SECOND in op.device for op in graph.get_operations() if "MatMul" in op.type]
        assert sum(products) == len(products) / 2 > 0
        tensors = [tensor for op in graph.get_operations() for tensor in op.outputs]
        sizes = {t.shape[-1] for t in tensors if t.dtype == tf.float64 and t.shape.rank}
        assert engine.config.model.vocab_size not in sizes, "whole logits"
    graph = chunk.functions[0].backward_weight.graph
    given_there = dict(zip((t.name for t in graph.inputs), handed_on[0], strict=False))
    # The whole backward of the embedding is W, so its gradient goes to the shards there.
    travels = [
        f"{tensor.name} to {op.name}"
        for op in graph.get_operations()
        for tensor in op.inputs
        if "embedding" not in tensor.name
        and given_there.get(tensor.name, SECOND in tensor.device) != (SECOND in op.device)
    ]
    assert travels == [] and any(handed_on[0]) and not all(handed_on[0])
    moments = engine.model.optimizer.variables
    cut = [weight for weight in chunk.weights if SECOND in weight.gradient.device]
    assert len(cut) == 11 and sum(SECOND in m.value.device for m in moments) == 2 * len(cut)


def test_a_shards_heads_have_the_masks_that_they_have_together() -> None:
    context = DropoutContext(tf.constant(STEP_KEY, tf.int64), tf.constant(SAMPLES))
    whole, shape = numpy_mask(6, (4, 6, 5, 5), 0.3), tf.TensorShape((4, 2, 5, 5))
    masks = [keep_mask(context, 6, shape, 0.3, (k, 3)).numpy() for k in range(3)]
    np.testing.assert_array_equal(np.concatenate(masks, 1), whole)


def test_the_loss_over_a_cut_vocabulary() -> None:
    """Logits hundreds apart, the largest in any shard; targets that do not count."""
    generator = np.random.default_rng(0)
    logits = tf.constant(300 * generator.normal(size=(4, 5, 10)))
    targets = generator.integers(0, 10, (4, 5))
    targets[1] = IGNORED
    options = {"from_logits": True, "ignore_class": IGNORED, "reduction": "sum"}
    right = keras.losses.SparseCategoricalCrossentropy(**options, dtype="float64")
    mine, losses, gradients = CrossEntropy(**options, dtype="float64"), [], []
    for loss, cut in ((right, False), (mine, True), (mine, False)):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            shards = tf.split(logits, (4, 3, 3), -1)  # 10 tokens on 3 shards
            losses.append(loss(targets, side_by_side(shards, [None] * 3) if cut else logits))
        gradients.append(tape.gradient(losses[-1], logits))
    for k in (1, 2):
        np.testing.assert_allclose(losses[k], losses[0], rtol=1e-14)
        np.testing.assert_allclose(gradients[k], gradients[0], rtol=0, atol=1e-14)


def test_only_a_transformer_is_cut() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel = 2: .* expected 1 for Keras layers"):
        GPipeModel([keras.layers.Dense(2), keras.layers.Dense(2)], 1, 1, tensor_parallel=2)
