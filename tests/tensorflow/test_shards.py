"""Shards of a stage on devices of one process: what is where, what crosses between them, and what
must be there once. The parity ladder holds them against the oracle.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from common.spec.data import IGNORED
from tests.engines import (
    SAMPLES,
    STEP_KEY,
    Make,
    assert_within,
    batch,
    different,
    numpy_mask,
    oracle_of,
    small,
)
from tf_impl import layers, ranks, shards
from tf_impl.dropout import DropoutContext, dropout, keep_mask
from tf_impl.gpipe_model import GPipeModel
from tf_impl.shards import CrossEntropy, side_by_side

RUN = {"tensor_parallel": 2, "vocab_parallel": True}
OPTIONS: dict[str, Any] = {"dtype": "float64", "dropout": 0.1, "num_layers": 1}
ON_FIRST, ON_SECOND = "", "/device:CPU:1"


def where(op: Any) -> str:
    return op.device if op.device in (ON_FIRST, ON_SECOND) else op.device.split("task:0")[-1]


def test_each_shard_computes_on_its_device_and_nothing_travels_in_w(make: Make) -> None:
    engine = make(1, "zb-h1", run=RUN, **OPTIONS)
    given, oracle = batch(engine), oracle_of(engine)
    losses = {"loss": engine.forward_backward(given), "held-out loss": engine.evaluate(given)}
    expected = {"loss": oracle.forward_backward(given), "held-out loss": oracle.evaluate(given)}
    assert_within(losses, expected, "loss", "float64")
    assert_within(engine.gradients(), oracle.gradients(), "gradient", "float64")
    (chunk,) = engine.model.chunks
    vocabulary = engine.config.model.vocab_size
    for name, function in chunk.functions[0].made().items():
        operations = getattr(function, "function", function).graph.get_operations()
        products = [where(op) for op in operations if "MatMul" in op.type]
        assert products.count(ON_FIRST) == products.count(ON_SECOND) == len(products) / 2 > 0
        shapes = [t.shape.as_list() for op in operations for t in op.outputs if t.shape.rank == 3]
        assert not any(shape[-1] == vocabulary for shape in shapes), "whole logits"
        if name == "backward_weight":
            travels = [
                op.name
                for op in operations
                for t in op.inputs
                if t.op.type != "Placeholder" and where(t.op)[-1:] != where(op)[-1:]
            ]
            assert travels == []
