"""bfloat16: computed low, added up high."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from common.spec.run import TransformerSpec
from tests.engines import (
    Make,
    batch,
    bfloat16_errors,
    check_all_float32,
    check_resumes,
    small,
    stretch,
    train,
)
from tf_impl.dropout import DropoutContext
from tf_impl.engine import build_engine
from tf_impl.gpipe_model import GPipeModel
from tf_impl.layers import build_unit
from tf_impl.precision import products_are_rounded

OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "dropout": 0.1, "tied_head": True}
ELSEWHERE = (
    (1, "gpipe", {}),
    (2, "zb-v", {"chunks": 2}),
    (3, "zb-h1", {"partition": (1, 3), "recompute": "full"}),
)


def test_bfloat16_computes_low_and_adds_up_high(make: Make, tmp_path: Path) -> None:
    engine = make(1, "gpipe", **OPTIONS)
    loss, gradient = bfloat16_errors(engine)
    assert loss < 2**-8 and gradient < 0.05
    train(engine, range(3))
    check_all_float32(engine)
    chunk = engine.model.chunks[0]
    pairs = [(own.numpy(), master.numpy()) for own, master, _ in chunk.weights]
    assert {own.dtype.name for own, _ in pairs} == {"bfloat16"}
    assert all(np.array_equal(own, master.astype(own.dtype)) for own, master in pairs)
    assert any(not np.array_equal(own.astype(np.float32), master) for own, master in pairs)
    engine.model.save_weights(tmp_path / "model.weights.h5")
    other = make(1, "gpipe", **OPTIONS)
    other.model.load_weights(tmp_path / "model.weights.h5")
    tokens = batch(engine).inputs
    np.testing.assert_array_equal(engine.predict(tokens), other.predict(tokens))


def test_bfloat16_has_the_same_bits_in_every_schedule(make: Make) -> None:
    check_resumes(make, ELSEWHERE, **OPTIONS)


def test_the_plain_loop_has_no_bfloat16() -> None:
    with pytest.raises(ValueError, match="executor = plain takes float32 or float64"):
        build_engine(small("tensorflow", 1, dtype="bfloat16", run={"executor": "plain"}))


def test_errors_of_bfloat16_have_no_sign() -> None:
    """A block's output and gradients beside the same block in float64: by how much rounding
    stretches them all.
    """
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> tf.Tensor:
        return tf.cast(tf.constant(generator.standard_normal(shape)), tf.bfloat16)

    spec = TransformerSpec(context_length=16, d_model=32, num_heads=4, d_ff=64, dropout=0.1)
    x, dy = numbers(64, 16, 32), numbers(64, 16, 32)
    context = DropoutContext(tf.constant(5, tf.int64), tf.range(64, dtype=tf.int64))
    blocks = {dtype: build_unit(spec, "block.0", dtype) for dtype in ("bfloat16", "float64")}
    for block in blocks.values():
        block.build(x.shape)
    pairs = list(zip(*(block.trainable_variables for block in blocks.values()), strict=True))
    for low, high in pairs:
        low.assign(numbers(*low.shape) * (0.2 if len(low.shape) == 2 else 1.0))
        high.assign(tf.cast(low, tf.float64))

    def run(dtype: str) -> list[tf.Tensor]:
        start, variables = tf.cast(x, dtype), [v.value for v in blocks[dtype].trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(start)
            y = blocks[dtype](start, context=context)
        found = [y, *tape.gradient(y, [start, *variables], tf.cast(dy, dtype))]
        return [tf.cast(tensor, tf.float64) for tensor in found]

    names = ["output", "input", *(low.path for low, _ in pairs)]
    roundoffs = {
        name: stretch(*each)
        for name, *each in zip(names, run("bfloat16"), run("float64"), strict=True)
    }
    # 1.7, 3.3 and a median of 3.2 with the operations that tf_impl.precision stands in for
    assert roundoffs["output"] < 0.2 and roundoffs["input"] < 0.2, roundoffs
    assert statistics.median(roundoffs.values()) < 0.4, roundoffs
    a, b = numbers(64, 32), numbers(32, 48)
    own = stretch(
        tf.cast(tf.matmul(a, b), tf.float64),
        tf.matmul(tf.cast(a, tf.float64), tf.cast(b, tf.float64)),
    )
    # TensorFlow's own product, -0.7 without oneDNN.
    assert products_are_rounded() == (own < 0.2), own


@pytest.mark.parametrize("compiled_first", [False, True])
def test_the_optimizer_is_built_for_the_masters_before_a_callback_builds_it(
    compiled_first: bool,
) -> None:
    """BackupAndRestore would build it for `trainable_variables`, which are in bfloat16."""
    spec = TransformerSpec(num_layers=1, context_length=8, d_model=16, num_heads=2, d_ff=16)
    model = GPipeModel(spec, 2, 2, dtype="bfloat16")
    work = [lambda: model.compile("adam", "mse"), lambda: model.build((None, 8))]
    for step in work if compiled_first else reversed(work):
        step()
    assert model.optimizer.built
    assert {variable.dtype for variable in model.optimizer._trainable_variables} == {"float32"}
