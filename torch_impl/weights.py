"""Canonical names to PyTorch's parameters, one by one, and NumPy arrays in and out of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.spec.parameters import TOKEN_EMBEDDING
from torch_impl.gradients import gradient_of
from torch_impl.layers import Block, Embedding, Head


class NamedParameter(NamedTuple):
    """A parameter and its canonical name."""

    name: str
    parameter: Tensor
    """A leaf with a gradient, once an engine has placed the model."""
    transposed: bool = False
    """nn.Linear stores (out, in), the canonical shape is (in, out)."""
    is_copy: bool = False
    """A tied head's copy of the token embedding; the embedding's own comes first in the model."""


def named_parameters(
    part: Sequence[str], units: Sequence[nn.Module], tied_head: bool
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
            case Head():  # a post-norm model's has no norm, and so no names of one
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


def _linear_parameters(name: str, layer: nn.Linear | None) -> list[NamedParameter]:
    """Those of a linear layer, which may be without a bias; none where there is no layer."""
    if layer is None:
        return []
    weight = NamedParameter(f"{name}.weight", layer.weight, transposed=True)
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
        _load_tensor(arrays[item.name], gradient_of(item.parameter), item.transposed)


def export_weights(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the weights as canonical arrays of their own memory."""
    return {item.name: _export_tensor(item.parameter, item.transposed) for item in named}


def export_gradients(named: Iterable[NamedParameter]) -> dict[str, NDArray[Any]]:
    """Return the gradients as canonical arrays of their own memory."""
    return {
        item.name: _export_tensor(gradient_of(item.parameter), item.transposed) for item in named
    }


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
    # A copy even on the CPU: else the next step would change what was exported.
    return array.T.copy() if transposed else array.copy()


def to_array(tensor: Tensor) -> NDArray[Any]:
    """`tensor` in NumPy; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    array: NDArray[Any] = (
        (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy()
    )
    return array
