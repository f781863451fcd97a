"""Weights as a plain PyTorch state dict, and back: `python -m torch_impl.convert`
(`common.checkpoint.foreign.converter`).

The state dict is that of `plain_model`, an ordinary module without a pipeline:

    model = plain_model(spec)
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    logits = model(tokens)  # (B, S) -> (B, S, V)

Its keys are the canonical names; linear weights are (out, in), as nn.Linear has them. What is read
may be such a file, a safetensors file of it, or a checkpoint with it under a usual key; a wrapper's
word in its names (`module.`) is taken off.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from common.checkpoint import Arrays, opened, read_header
from common.checkpoint.foreign.converter import (
    check_names,
    check_tied,
    in_one_line,
    main,
    note_dtypes,
)
from common.checkpoint.foreign.errors import ExchangeError
from common.checkpoint.foreign.names import unwrapped, weights_in
from common.checkpoint.foreign.source import find
from common.io.edges import printable
from common.spec.parameters import TOKEN_EMBEDDING, unit_names
from common.spec.run import TransformerSpec
from torch_impl.layers import Embedding, Head, build_unit
from torch_impl.weights import export_weights, load_weights, named_parameters

_TIED = "head.output.weight"
"""The same tensor as the token embedding, where the head is tied; a file need not have it twice."""


class Transformer(nn.Module):
    """The model by itself. It has no dropout: that takes the harness' masks."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        names = unit_names(spec)
        self.embedding = Embedding(spec)
        self.block = nn.ModuleList(build_unit(spec, name) for name in names[1:-1])
        self.head = Head(spec)
        if spec.tied_head:
            self.head.output.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens, None)  # (B, S, D)
        for block in self.block:
            x = block(x, None)
        logits: Tensor = self.head(x, None)  # (B, S, V)
        return logits


def plain_model(spec: TransformerSpec) -> Transformer:
    """Return the model whose weights these files hold, still to be loaded."""
    return Transformer(spec)


def write_weights(spec: TransformerSpec, weights: Arrays, path: Path) -> None:
    """Write the state dict with `torch.save`."""
    model = plain_model(spec).to(torch.from_numpy(weights[TOKEN_EMBEDDING]).dtype)
    load_weights(_named(spec, model), weights)
    torch.save(model.state_dict(), path)


def read_weights(spec: TransformerSpec, path: Path) -> Mapping[str, NDArray[Any]]:
    """Read a state dict, with `weights_only`: no code in it is run. Raises ExchangeError."""
    found = _tensors(find(path).files)
    state = {short: found[name] for short, name in unwrapped(found, ("model",)).items()}
    if spec.tied_head and _TIED not in state and TOKEN_EMBEDDING in state:
        state[_TIED] = state[TOKEN_EMBEDDING]
    model = plain_model(spec)
    wanted = model.state_dict()
    check_names(set(state), set(wanted))
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ExchangeError(
                f"{name} has shape {list(value.shape)}; expected {list(wanted[name].shape)}"
            )
        if not value.is_floating_point():
            raise ExchangeError(f"{name} has dtype {value.dtype}; expected float32 or float64")
    if spec.tied_head:
        check_tied(state[TOKEN_EMBEDDING].double().numpy(), state[_TIED].double().numpy())
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    note_dtypes(dtypes)
    if dtypes == ["float64"]:
        model.double()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExchangeError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    return export_weights(_named(spec, model))


def _read_tensors(paths: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """All tensors of state dicts, by their own names. Raises ExchangeError."""
    found = _tensors(paths)
    for name, value in found.items():
        # a view without end of a few bytes
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ExchangeError(f"{printable(name)} is larger than what the file has of it")
        if value.dtype == torch.bfloat16:  # which NumPy lacks
            found[name] = value.float()
    return {name: value.contiguous().numpy() for name, value in found.items()}


def _tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The state dict in these files together. Raises ExchangeError."""
    found: dict[str, Tensor] = {}
    for path in paths:
        state = _safetensors(path) if path.suffix == ".safetensors" else _state_dict(path)
        if twice := sorted(found.keys() & state.keys()):
            raise ExchangeError(f"{path}: {printable(twice[0])} is in another of these files too")
        found |= state
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    with opened(path, follow_links=True):
        read_header(path)  # a header that lies takes no memory
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ExchangeError(f"{path}: {in_one_line(error)}") from None


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can be wrong in every way
        # PyTorch's reason, without its advice on how to load what is not to be trusted.
        reason = (
            str(error)
            .rpartition("WeightsUnpickler error: ")[2]
            .strip()
            .split("\n")[0]
            .split(". ")[0]
        )
        why = f"{type(error).__name__}: {reason[:200]}"
        raise ExchangeError(
            f"{path}: no state dict that torch.load(weights_only=True) reads: {why}"
        ) from None
    try:
        return weights_in(loaded, lambda value: isinstance(value, Tensor))
    except ExchangeError as error:
        raise ExchangeError(f"{path}: {error}") from None


def _named(spec: TransformerSpec, model: Transformer) -> Any:
    units = [model.embedding, *model.block, model.head]
    named = named_parameters(unit_names(spec), units, spec.tied_head)
    return [item for item in named if not item.is_copy]  # a tied head shares its weight here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], write_weights, read_weights, _read_tensors))
