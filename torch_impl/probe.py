"""Every unit by itself, fed with given tensors: an error of one unit reaches no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.runtime.mode import Mode
from common.spec.data import Batch
from common.spec.parameters import TensorKey
from torch_impl.dropout import DropoutContext
from torch_impl.gradients import gradient_of
from torch_impl.stage import Stage
from torch_impl.weights import export_weights, named_parameters, to_array


def probe_units(
    stage: Stage,
    device: int,
    batch: Batch,
    inputs: Mapping[str, NDArray[Any]],
    output_gradients: Mapping[str, NDArray[Any]],
) -> dict[TensorKey, NDArray[Any]]:
    """`Engine.probe_units` for the units of one device, by PyTorch's plain autograd."""
    # The micro-batches of all replicas, so that each has the whole sums.
    config = stage.config
    stage.begin(
        batch, Mode.RECORD, batch.micro_batches(config.replicas * config.train.micro_batches)
    )
    tied_head = config.model.tied_head
    found: dict[TensorKey, NDArray[Any]] = {}
    for chunk in stage.chunks:
        for name, unit in zip(chunk.part, chunk.units, strict=True):
            named = named_parameters([name], [unit], tied_head)
            sums = [torch.zeros_like(gradient_of(item.parameter)) for item in named]
            forward = TensorKey(batch.step, "unit_forward", device, -1, name, "output")
            backward = forward._replace(phase="unit_backward", tensor="input_gradient")
            for i, (tokens, context) in enumerate(_micro_batches(stage)):
                # (b, S, D), but the embedding's are tokens (b, S)
                x = _piece(stage, inputs[name], i).requires_grad_() if name in inputs else tokens
                output = unit(x, context)  # (b, S, D), or the head's logits (b, S, V)
                wanted = [x] if x is not None and x.requires_grad else []
                gradients = torch.autograd.grad(
                    output,
                    [*wanted, *(item.parameter for item in named)],
                    _piece(stage, output_gradients[name], i),
                )
                found[forward._replace(micro_batch=i)] = to_array(stage.shards.whole(name, output))
                if wanted:
                    found[backward._replace(micro_batch=i)] = to_array(gradients[0])
                for total, gradient in zip(sums, gradients[len(wanted) :], strict=True):
                    total += gradient
            for item, total in zip(named, sums, strict=True):
                array = export_weights([item._replace(parameter=total)])[item.name]
                found[backward._replace(tensor=item.name)] = array
        chunk.take_taps()
    return found


def _micro_batches(stage: Stage) -> list[tuple[Tensor | None, DropoutContext | None]]:
    """Tokens (b, S), where the embedding is here, and dropout of each micro-batch of the pass."""
    now = stage.now
    tokens: Sequence[Tensor | None] = now.tokens or [None] * len(now.contexts)
    return list(zip(tokens, now.contexts, strict=True))


def _piece(stage: Stage, array: NDArray[Any], micro_batch: int) -> Tensor:
    """The micro-batch's rows of a whole mini-batch's tensor, on the stage, in its precision."""
    piece = torch.from_numpy(array).tensor_split(len(stage.now.sequences))[micro_batch]
    return piece.to(stage.device, getattr(torch, stage.config.train.dtype))
