"""Weights as a Paddle state dict, and back: `python -m paddle_impl.convert`
(`common.checkpoint.foreign.converter`).

The state dict is that of `plain_model`, an ordinary layer without a pipeline:

    model = plain_model(spec)
    model.set_state_dict(paddle.load("weights.pdparams"))
    logits = model(tokens)  # (B, S) -> (B, S, V)

Differs: `paddle.load` unpickles whatever the file says, so it is not used here. A .pdparams file is
a pickled dictionary of NumPy arrays; `_ArraysOnly` reads exactly that and nothing else.
"""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from common.checkpoint import Arrays
from common.checkpoint.foreign.converter import check_names, check_tied, in_one_line, main
from common.checkpoint.foreign.errors import ExchangeError, note
from common.checkpoint.foreign.names import unwrapped, weights_in
from common.spec.parameters import TOKEN_EMBEDDING, unit_names
from common.spec.run import TransformerSpec
from paddle_impl.dropout import DropoutContext
from paddle_impl.layers import build_unit
from paddle_impl.split_linear import merge_backward
from paddle_impl.weights import load_weights, named_parameters

_NAME_TABLE = "StructuredToParameterName@@"
"""What `paddle.save` adds to a state dict: Paddle's own names of the parameters."""
_TIED = "head.tied_weight"
"""The same tensor as the token embedding, where the head is tied; a file need not have it twice."""


class Transformer(nn.Layer):
    """The model by itself. It has no dropout: that takes the harness' masks."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        names, context = unit_names(spec), DropoutContext()
        self.embedding = build_unit(spec, names[0], context)
        self.block = nn.LayerList([build_unit(spec, name, context) for name in names[1:-1]])
        self.head = build_unit(spec, names[-1], context)
        if spec.tied_head:
            self.head.tied_weight = self.embedding.token.weight
        merge_backward(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (B, S, D)
        for block in self.block:
            x = block(x)
        return self.head(x)  # (B, S, V)


def plain_model(spec: TransformerSpec) -> Transformer:
    """Return the model of these files, still without weights, in Paddle's default dtype."""
    return Transformer(spec.model_copy(update={"dropout": 0.0}))


def write_weights(spec: TransformerSpec, weights: Arrays, path: Path) -> None:
    """Write the state dict with `paddle.save`."""
    paddle.set_default_dtype(str(weights[TOKEN_EMBEDDING].dtype))
    model = plain_model(spec)
    load_weights(_named(spec, model), weights)
    paddle.save(model.state_dict(), str(path))


def read_weights(spec: TransformerSpec, path: Path) -> Mapping[str, NDArray[Any]]:
    """Read a state dict; of its pickle, arrays alone. Raises ExchangeError."""
    try:
        with path.open("rb") as file:
            loaded = _ArraysOnly(file).load()
    except ExchangeError:
        raise
    except Exception as error:  # a pickle can be wrong in every way
        raise ExchangeError(f"{path}: no state dict: {in_one_line(error)}") from None
    try:
        found = weights_in(
            loaded, lambda value: isinstance(_array_in(value), np.ndarray), besides=_NAME_TABLE
        )
    except ExchangeError as error:
        raise ExchangeError(f"{path}: {error}") from None
    state = {
        short: _wide(_array_in(found[name])) for short, name in unwrapped(found, ("model",)).items()
    }
    if spec.tied_head and _TIED not in state and TOKEN_EMBEDDING in state:
        state[_TIED] = state[TOKEN_EMBEDDING]
    model = plain_model(spec)
    check_names(set(state), set(model.state_dict()))
    if spec.tied_head:
        check_tied(state[TOKEN_EMBEDDING], state.pop(_TIED))
    # Differs: (in, out) and the canonical names already; nothing is left to do in Paddle's tensors
    return state


def _array_in(value: Any) -> Any:
    """The array; in a nested dictionary Paddle saves a tensor as its name and its array."""
    return value[1] if isinstance(value, tuple) and len(value) == 2 else value


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16, which NumPy lacks and Paddle saves as its bits, as float32."""
    if array.dtype != np.uint16:
        return array
    note("bfloat16 becomes float32")
    return (array.astype(np.uint32) << 16).view(np.float32)


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, and what pickle has without any name: dictionaries, lists, text, numbers."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _empty_array
            case ("numpy", "ndarray"):
                return None  # the type: `_empty_array` does not look, and nobody can call it
            case ("numpy", "dtype"):
                return _number_dtype
            case "collections", "OrderedDict":
                return OrderedDict
            case ("builtins" | "__builtin__", "tuple"):
                return tuple
            case ("_codecs", "encode"):  # how pickle protocol 2 writes bytes
                return lambda text, encoding: text.encode("latin1")
        raise ExchangeError(f"the file asks for {module}.{name}; expected a state dict of arrays")


def _empty_array(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """What NumPy fills in afterwards, with as many bytes as the file has."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _number_dtype(code: Any, *rest: Any) -> np.dtype[Any]:
    """Numbers (an optimizer's counters are whole ones), never objects."""
    dtype = np.dtype(str(code))
    if dtype.kind not in "fiub":
        raise ExchangeError(f"an array of dtype {dtype}; expected float32 or float64")
    return dtype


def _named(spec: TransformerSpec, model: Transformer) -> Any:
    units = [model.embedding, *model.block, model.head]
    named = named_parameters(unit_names(spec), units, spec.tied_head)
    return [item for item in named if not item.is_copy]  # a tied head shares its weight here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], write_weights, read_weights))
