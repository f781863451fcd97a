"""Every unit by itself, fed with given tensors: an error of one unit reaches no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.distributed.communication.group import Group

from common.runtime.mode import Mode
from common.spec.data import Batch
from common.spec.parameters import TensorKey
from paddle_impl.gradient_sum import GradientSum
from paddle_impl.stage import Stage
from paddle_impl.weights import NamedParameter, export_gradients, named_parameters, to_array


def probe_units(
    stage: Stage,
    device: int,
    batch: Batch,
    inputs: Mapping[str, NDArray[Any]],
    output_gradients: Mapping[str, NDArray[Any]],
    copies: Group | None,
) -> dict[TensorKey, NDArray[Any]]:
    """`common.runtime.engine.Engine.probe_units` for the units of one device, by Paddle's plain
    autograd; `copies` are the replicas of the stage, where there are several.
    """
    stage.begin(batch, Mode.RECORD)
    found: dict[TensorKey, NDArray[Any]] = {}
    for name, unit in (named_unit for chunk in stage.chunks for named_unit in chunk):
        named = named_parameters([name], [unit], stage.config.model.tied_head)
        forward = TensorKey(batch.step, "unit_forward", device, -1, name, "output")
        backward = forward._replace(phase="unit_backward", tensor="input_gradient")
        with _no_gradients(named):
            for i, tokens in enumerate(stage.tokens):
                stage.prepare(i)
                x = _piece(stage, inputs[name], i) if name in inputs else tokens
                x.stop_gradient = name not in inputs
                output = unit(x)  # (b, S, D), or (b, S, V)
                number = stage.first + i
                found[forward._replace(micro_batch=number)] = to_array(
                    stage.shards.whole(name, output)
                )
                paddle.autograd.backward([output], [_piece(stage, output_gradients[name], i)])
                if name in inputs:
                    found[backward._replace(micro_batch=number)] = to_array(x.grad)
            if copies is not None:
                GradientSum([item.parameter.grad for item in named], copies).finish()
            found |= {
                backward._replace(tensor=key): array
                for key, array in export_gradients(named).items()
            }
    return found


@contextmanager
def _no_gradients(named: Sequence[NamedParameter]) -> Iterator[None]:
    """Sets the parameters' gradients aside.

    Differs: our linear layers add to their weights' gradients themselves: none can be asked for.
    """
    gradients = [item.parameter.grad for item in named]
    # clearing empties their memory
    kept = [None if gradient is None else gradient.clone() for gradient in gradients]
    for item in named:
        item.parameter.clear_gradient(set_to_zero=False)
    try:
        yield
    finally:
        for item, gradient in zip(named, kept, strict=True):
            item.parameter.clear_gradient(set_to_zero=False)
            if gradient is not None:
                item.parameter.grad = gradient


def _piece(stage: Stage, array: NDArray[Any], micro_batch: int) -> Tensor:
    """The micro-batch's rows of a tensor of the whole mini-batch, in the run's precision."""
    count = stage.config.replicas * stage.config.train.micro_batches
    piece = np.array_split(array, count)[stage.first + micro_batch]
    return paddle.to_tensor(piece, dtype=stage.config.train.dtype)
