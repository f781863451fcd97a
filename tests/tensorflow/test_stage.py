"""The cut of a stage's graph into F, B and W."""

from __future__ import annotations

import gc
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops  # no public names
from tensorflow.python.framework.func_graph import FuncGraph

from tests.engines import Make, batch, different, small
from tf_impl.cut_graphs.scissors import Scissors
from tf_impl.cut_graphs.trace import trace_stage
from tf_impl.effects import REPEATED
from tf_impl.engine import build_engine


def test_split_backward_gives_the_bits_of_the_merged_one(make: Make, tmp_path: Path) -> None:
    found = []
    for backward in ("BW{0}", "B{0} W{0}"):
        line = " ".join(f"F{i} {backward.format(i)}" for i in range(4))
        (tmp_path / "table.txt").write_text(
            f"# schedule: one micro_batches=4\n0: {line}\n1: {line}\n"
        )
        engine = make(
            2, f"file:{tmp_path / 'table.txt'}", num_layers=1, dropout=0.1, tied_head=True
        )
        engine.forward_backward(batch(engine, 3))
        found.append(engine.gradients())
    assert all(np.any(gradient) for gradient in found[0].values())
    assert different(*found) == []


def test_an_engine_that_is_gone_leaves_no_graph_behind() -> None:
    def made_and_gone() -> None:
        engine = build_engine(small("tensorflow", 2))
        given = batch(engine)
        engine.evaluate(given)
        engine.forward_backward(given)
        engine.apply_gradients(0)
        engine.close()

    def left() -> tuple[int, int]:
        gc.collect()
        graphs = sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())
        return graphs, len(ops.gradient_registry._registry)

    made_and_gone()  # TensorFlow keeps what it has traced last
    before = left()
    made_and_gone()
    assert left() == before


def test_no_operation_on_data_is_in_two_of_f_b_and_w() -> None:
    dense = [
        keras.layers.Dense(8, activation="gelu"),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(3),
    ]
    for layer, width in zip(dense, (5, 8, 8), strict=True):
        layer.build((None, width))
    variables = [variable.value for layer in dense for variable in layer.trainable_variables]
    sums = [tf.Variable(tf.zeros_like(variable)) for variable in variables]

    def rest(h: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        return dense[2](dense[1](h)), {}

    trace, _ = trace_stage(dense[0], [rest], variables, sums, [tf.TensorSpec((4, 5))], False)
    scissors = Scissors(trace)
    dy, f, b, w = (
        trace.output_gradient,
        scissors.forward,
        scissors.backward_input,
        scissors.backward_weight,
    )
    saved = scissors.crossing(b - {dy[0].op}, f, [])
    for_weight = [
        *scissors.crossing(w, f, trace.weight_gradients),
        *scissors.crossing(w, b, trace.weight_gradients),
    ]
    parts = []
    for arguments, results in (
        (trace.inputs, [trace.output, *saved]),
        ([*dy, *saved], scissors.crossing(w, b, trace.weight_gradients)),
        (for_weight, trace.weight_gradients),
    ):
        graph = scissors.function(arguments, results).graph
        parts.append({op.name for op in graph.get_operations() if op.type != "Placeholder"})
    on_data = {op.name for op in scissors.dependent if op.type not in REPEATED}
    forward, backward, weight = parts
    assert not on_data & (forward & backward | forward & weight | backward & weight)
