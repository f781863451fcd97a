"""Weights as a plain PyTorch state dict, and back: `python -m torch_impl.convert` (`common.exchange.child`).

The state dict is that of `plain_model`, an ordinary module without a pipeline:

    model = plain_model(spec)
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    logits = model(tokens)  # (B, S) -> (B, S, V)

Its keys are the canonical names; linear weights are (out, in), as nn.Linear has them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.exchange.child import ExchangeError, check_names, check_tied, main
from common.snapshot import Arrays
from common.spec import TransformerSpec
from common.weights import TOKEN_EMBEDDING, unit_names
from torch_impl.layers import build_unit
from torch_impl.weights import export_weights, load_weights, named_parameters


class Transformer(nn.Module):
    """The model by itself. It has no dropout: that takes the harness' masks."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        names = unit_names(spec)
        self.embedding = build_unit(spec, names[0])
        self.block = nn.ModuleList(build_unit(spec, name) for name in names[1:-1])
        self.head = build_unit(spec, names[-1])
        if spec.tied_head:
            self.head.output.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens, None)  # (B, S, D)
        for block in self.block:
            x = block(x, None)
        return self.head(x, None)  # (B, S, V)


def plain_model(spec: TransformerSpec) -> Transformer:
    """The model whose weights these files hold, still to be loaded."""
    return Transformer(spec)


def write_weights(spec: TransformerSpec, weights: Arrays, path: Path) -> None:
    """Writes the state dict with `torch.save`."""
    model = plain_model(spec).to(torch.from_numpy(weights[TOKEN_EMBEDDING]).dtype)
    load_weights(_named(spec, model), weights)
    torch.save(model.state_dict(), path)


def read_weights(spec: TransformerSpec, path: Path) -> Mapping[str, NDArray[Any]]:
    """Reads a state dict, with `weights_only`: no code in it is run. Raises ExchangeError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can be wrong in every way
        # PyTorch's reason, without its advice on how to load what is not to be trusted.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0].split(". ")[0]
        why = f"{type(error).__name__}: {reason[:200]}"
        raise ExchangeError(f"{path}: no state dict that torch.load(weights_only=True) reads: {why}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ExchangeError(f"{path}: right would be a dictionary of tensors")
    model = plain_model(spec)
    check_names({str(name) for name in state}, set(model.state_dict()))
    if spec.tied_head:
        check_tied(state[TOKEN_EMBEDDING].float().numpy(), state["head.output.weight"].float().numpy())
    if all(value.dtype == torch.float64 for value in state.values()):
        model.double()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExchangeError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    return export_weights(_named(spec, model))


def _named(spec: TransformerSpec, model: Transformer) -> Any:
    units = [model.embedding, *model.block, model.head]
    named = named_parameters(unit_names(spec), units, spec.tied_head)
    return [item for item in named if not item.is_copy]  # a tied head shares its weight here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], write_weights, read_weights))
