"""Canonical names to PyTorch's parameters, one by one, and NumPy arrays in and out of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.spec.parameters import TOKEN_EMBEDDING
from torch_impl.layers import Block, Embedding, Head


class NamedParameter(NamedTuple):
    """A parameter and its canonical name."""

    name: str
    parameter: nn.Parameter
    transposed: bool = False
    """nn.Linear stores (out, in), the canonical shape is (in, out)."""
    is_copy: bool = False
    """A tied head's copy of the token embedding; the embedding's own comes first in the model."""


def named_parameters(
    part: Sequence[str], units: Sequence[nn.Module], tied_head: bool
) -> list[NamedParameter]:
    """Return every parameter of `units`, whose names are `part`, in canonical order.

    Raises ValueError for one that has no canonical name.
    """
    named: list[NamedParameter] = []
    for name, unit in zip(part, units, strict=True):
        match unit:
            case Embedding():
                named += [
                    NamedParameter(TOKEN_EMBEDDING, unit.token.weight),
                    NamedParameter("embedding.position.weight", unit.position.weight),
                ]
            case Block():
                named += _block_parameters(name, unit)
            case Head():
                named += _norm_parameters("head.norm", unit.norm)
                if tied_head:
                    named.append(NamedParameter(TOKEN_EMBEDDING, unit.output.weight, is_copy=True))
                else:
                    named.append(
                        NamedParameter("head.output.weight", unit.output.weight, transposed=True)
                    )
    _check_all_are_named(part, units, named)
    return named


def _norm_parameters(name: str, norm: nn.Module) -> list[NamedParameter]:
    """Those of any norm, by its own names; none of the identity where there is no norm."""
    return [
        NamedParameter(f"{name}.{own}", parameter) for own, parameter in norm.named_parameters()
    ]


def _block_parameters(name: str, block: Block) -> list[NamedParameter]:
    attention, feed_forward = block.attention, block.feed_forward
    return [
        *_norm_parameters(f"{name}.norm_1", block.norm_1),
        NamedParameter(f"{name}.attention.query.weight", attention.query.weight, transposed=True),
        NamedParameter(f"{name}.attention.query.bias", attention.query.bias),
        NamedParameter(f"{name}.attention.key.weight", attention.key.weight, transposed=True),
        NamedParameter(f"{name}.attention.value.weight", attention.value.weight, transposed=True),
        NamedParameter(f"{name}.attention.value.bias", attention.value.bias),
        NamedParameter(f"{name}.attention.output.weight", attention.output.weight, transposed=True),
        NamedParameter(f"{name}.attention.output.bias", attention.output.bias),
        *_norm_parameters(f"{name}.norm_2", block.norm_2),
        NamedParameter(f"{name}.feed_forward.up.weight", feed_forward.up.weight, transposed=True),
        NamedParameter(f"{name}.feed_forward.up.bias", feed_forward.up.bias),
        NamedParameter(
            f"{name}.feed_forward.down.weight", feed_forward.down.weight, transposed=True
        ),
        NamedParameter(f"{name}.feed_forward.down.bias", feed_forward.down.bias),
    ]


def _check_all_are_named(
    part: Sequence[str], units: Sequence[nn.Module], named: Sequence[NamedParameter]
) -> None:
    """A parameter without a name would be neither loaded nor saved, and nobody would see it."""
    known = {id(item.parameter) for item in named}
    for name, unit in zip(part, units, strict=True):
        for own, parameter in unit.named_parameters():
            if id(parameter) not in known:
                raise ValueError(
                    f"{own} of {name} has no canonical name; expected one in torch_impl/weights.py"
                )


@torch.no_grad()
def load_weights(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy canonical arrays into the parameters. Raises KeyError for a missing one."""
    for item in named:
        _load_tensor(arrays[item.name], item.parameter, item.transposed)


@torch.no_grad()
def load_gradients(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy canonical arrays into the parameters' gradients. Raises KeyError for a missing one."""
    for item in named:
        _load_tensor(arrays[item.name], item.parameter.grad, item.transposed)


def export_weights(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the weights as canonical arrays of their own memory."""
    return {item.name: _export_tensor(item.parameter, item.transposed) for item in named}


def export_gradients(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the gradients as canonical arrays of their own memory."""
    return {item.name: _export_tensor(item.parameter.grad, item.transposed) for item in named}


def _load_tensor(array: NDArray[Any], tensor: Tensor, transposed: bool) -> None:
    """Copies an array of canonical shape into `tensor`. Raises ValueError for another shape."""
    source = torch.from_numpy(array.T if transposed else array)
    if source.shape != tensor.shape:  # `copy_` would broadcast
        raise ValueError(
            f"an array of shape {list(source.shape)} for a parameter of shape {list(tensor.shape)}"
        )
    tensor.copy_(source)


def _export_tensor(tensor: Tensor, transposed: bool) -> NDArray[Any]:
    """`tensor` as an array of canonical shape, with memory of its own."""
    array = to_array(tensor)
    return array.T.copy() if transposed else array.copy()


def to_array(tensor: Tensor) -> NDArray[Any]:
    """`tensor` in NumPy; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    array: NDArray[Any] = (
        (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy()
    )
    return array
