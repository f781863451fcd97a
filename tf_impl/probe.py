"""Every unit by itself, fed with given tensors: an error of one unit reaches no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from common.spec.data import Batch
from common.spec.parameters import TensorKey
from tf_impl.cut_graphs.tensors import dense
from tf_impl.dropout import DropoutContext
from tf_impl.gpipe_model import GPipeModel
from tf_impl.weights import export_weights, named_parameters, to_array


def probe_units(
    model: GPipeModel,
    device: int,
    batch: Batch,
    inputs: Mapping[str, NDArray[Any]],
    output_gradients: Mapping[str, NDArray[Any]],
    replicas: int = 1,
) -> dict[TensorKey, NDArray[Any]]:
    """`common.runtime.engine.Engine.probe_units` for the units of one device, by TensorFlow's plain
    tape, run eagerly. Every replica takes the micro-batches of all, so none has to be added up.
    """
    count = replicas * model.schedule.num_micro_batches
    pieces = batch.micro_batches(count)
    seeds = model.dropout_context(len(batch.inputs), batch.step, count)
    found: dict[TensorKey, NDArray[Any]] = {}
    assert model.spec is not None  # the harness makes Transformers only
    for chunk in model.stages[device].chunks:
        for unit in chunk.layers:
            name = unit.unit_name
            named = named_parameters([unit.unit_name], [unit], model.spec.tied_head)
            variables = [chunk.local(item.parameter) for item in named]
            sums = [tf.zeros_like(model.master_of(item.parameter).value) for item in named]
            forward = TensorKey(batch.step, "unit_forward", device, -1, name, "output")
            backward = forward._replace(phase="unit_backward", tensor="input_gradient")
            for i, piece in enumerate(pieces):
                # `inputs` and `output_gradients` are of the whole mini-batch: (B, S, D).
                rows = slice(piece.samples[0], piece.samples[-1] + 1)
                x = tf.constant(inputs[name][rows] if name in inputs else piece.inputs)
                x = tf.cast(x, unit.dtype) if name in inputs else x
                context = (
                    DropoutContext(*(tf.constant(value, tf.int64) for value in seeds[i]))
                    if seeds
                    else None
                )
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([*variables, *([x] if name in inputs else [])])
                    output = unit(x, context=context)  # (b, S, D), or (b, S, V)
                dy = tf.cast(output_gradients[name][rows], output.dtype)
                dx, *dw = tape.gradient(output, [x, *variables], output_gradients=dy)
                found[forward._replace(micro_batch=i)] = to_array(output)
                if name in inputs:
                    found[backward._replace(micro_batch=i)] = to_array(dx)
                sums = [
                    total + tf.cast(dense(g, total.dtype), total.dtype)
                    for total, g in zip(sums, dw, strict=True)
                ]
            pairs = zip(named, sums, strict=True)
            totals = export_weights(item._replace(parameter=total) for item, total in pairs)
            found |= {backward._replace(tensor=name): total for name, total in totals.items()}
    return found
