"""Canonical names to Paddle's parameters, one by one, and NumPy arrays in and out of them.

Differs: nothing is transposed. Paddle's Linear stores (in, out), which is the canonical shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from common.spec.parameters import TOKEN_EMBEDDING
from paddle_impl.layers import Block, Embedding, Head
from paddle_impl.rounding import at_least_float32


class NamedParameter(NamedTuple):
    """A parameter and its canonical name."""

    name: str
    parameter: Tensor
    is_copy: bool = False
    """A tied head's copy of the token embedding; the embedding's own comes first in the model."""


def named_parameters(
    part: Sequence[str], units: Sequence[nn.Layer], tied_head: bool
) -> list[NamedParameter]:
    """Return all parameters of `units` in canonical order. Raises ValueError for a nameless one."""
    named: list[NamedParameter] = []
    for name, unit in zip(part, units, strict=True):
        match unit:
            case Embedding():
                named.append(NamedParameter(TOKEN_EMBEDDING, unit.token.weight))
                if unit.position is not None:
                    named.append(NamedParameter("embedding.position.weight", unit.position.weight))
            case Block():
                named += _block_parameters(name, unit)
            case Head():
                named += _norm_parameters("head.norm", unit.norm)
                if tied_head:
                    named.append(NamedParameter(TOKEN_EMBEDDING, unit.tied_weight, is_copy=True))
                else:
                    named.append(NamedParameter("head.output.weight", unit.output.weight))
    _check_all_are_named(part, units, named)
    return named


def _norm_parameters(name: str, norm: nn.Layer) -> list[NamedParameter]:
    """Those of any norm, by its own names; none of the identity where there is no norm."""
    return [
        NamedParameter(f"{name}.{own}", parameter) for own, parameter in norm.named_parameters()
    ]


def _linear_parameters(name: str, layer: nn.Layer | None) -> list[NamedParameter]:
    """Those of a linear layer, which may be without a bias; none where there is no layer."""
    if layer is None:
        return []
    weight = NamedParameter(f"{name}.weight", layer.weight)
    return [weight] if layer.bias is None else [weight, NamedParameter(f"{name}.bias", layer.bias)]


def _block_parameters(name: str, block: Block) -> list[NamedParameter]:
    attention, feed_forward = block.attention, block.feed_forward
    return [
        *_norm_parameters(f"{name}.norm_1", block.norm_1),
        *_linear_parameters(f"{name}.attention.query", attention.query),
        *_linear_parameters(f"{name}.attention.key", attention.key),
        *_linear_parameters(f"{name}.attention.value", attention.value),
        *_linear_parameters(f"{name}.attention.output", attention.output),
        *_norm_parameters(f"{name}.norm_2", block.norm_2),
        *_linear_parameters(f"{name}.feed_forward.gate", feed_forward.gate),
        *_linear_parameters(f"{name}.feed_forward.up", feed_forward.up),
        *_linear_parameters(f"{name}.feed_forward.down", feed_forward.down),
    ]


def _check_all_are_named(
    part: Sequence[str], units: Sequence[nn.Layer], named: Sequence[NamedParameter]
) -> None:
    """A parameter without a name would be neither loaded nor saved, and nobody would see it."""
    known = {id(item.parameter) for item in named}
    for name, unit in zip(part, units, strict=True):
        for own, parameter in unit.named_parameters():
            if id(parameter) not in known:
                raise ValueError(
                    f"{own} of {name} has no canonical name; expected one in paddle_impl/weights.py"
                )


@paddle.no_grad()
def load_weights(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy canonical arrays into the parameters. Raises KeyError for a missing one."""
    for item in named:
        item.parameter.set_value(_checked(arrays[item.name], item))


def load_gradients(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Make canonical arrays the parameters' gradients. Raises KeyError for a missing one."""
    for item in named:
        item.parameter.grad = paddle.to_tensor(_checked(arrays[item.name], item))


def export_weights(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the weights as canonical arrays of their own memory."""
    return {item.name: to_array(item.parameter) for item in named}


def export_gradients(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the gradients as canonical arrays of their own memory."""
    return {item.name: to_array(item.parameter.grad) for item in named}


def _checked(array: NDArray[Any], item: NamedParameter) -> NDArray[Any]:
    if list(array.shape) != list(item.parameter.shape):
        raise ValueError(
            f"{item.name} has shape {list(item.parameter.shape)}, the array {list(array.shape)}"
        )
    return array


def to_array(tensor: Tensor) -> NDArray[Any]:
    """`tensor` in NumPy, with memory of its own; bfloat16, which NumPy lacks, as float32."""
    array: NDArray[Any] = at_least_float32(tensor).numpy().copy()
    return array
