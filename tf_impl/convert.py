"""Weights as Keras' own file, and back: `python -m tf_impl.convert` (`common.exchange.child`).

The file is that of `plain_model`, an ordinary Keras model without a pipeline:

    model = plain_model(spec)
    model.load_weights("model.weights.h5")
    logits = model(tokens)  # (B, S) -> (B, S, V)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
from numpy.typing import NDArray

from common.exchange.child import ExchangeError, check_tied, in_one_line, main
from common.snapshot import Arrays
from common.spec import TransformerSpec
from common.weights import TOKEN_EMBEDDING, unit_names
from tf_impl.layers import build_unit
from tf_impl.weights import export_weights, load_weights, named_parameters


def plain_model(spec: TransformerSpec, dtype: str = "float32", length: int | None = None) -> keras.Sequential:
    """The model whose weights these files hold, still to be loaded, for `length` tokens (default: the context).

    It has no dropout: that takes the harness' masks.
    """
    inputs = keras.Input((length or spec.context_length,), dtype="int64")
    return keras.Sequential([inputs, *(build_unit(spec, name, dtype) for name in unit_names(spec))])


def write_weights(spec: TransformerSpec, weights: Arrays, path: Path) -> None:
    """Writes the file with `save_weights`."""
    if not path.name.endswith(".weights.h5"):
        raise ExchangeError(f"{path}: Keras wants a name that ends in .weights.h5")
    model = plain_model(spec, str(weights[TOKEN_EMBEDDING].dtype))
    load_weights(_named(spec, model), weights)
    model.save_weights(path, overwrite=True)


def read_weights(spec: TransformerSpec, path: Path) -> Mapping[str, NDArray[Any]]:
    """Reads a file of `plain_model`; HDF5 holds no code. Raises ExchangeError."""
    if not path.name.endswith(".weights.h5"):
        raise ExchangeError(f"{path}: Keras wants a name that ends in .weights.h5")
    model = plain_model(spec, _dtype(path))
    try:
        model.load_weights(path)
    except Exception as error:  # HDF5 can be wrong in every way
        raise ExchangeError(f"{path}: not the weights of this model: {in_one_line(error)}") from None
    named = _named(spec, model)
    if spec.tied_head:
        own, copy = (item.parameter.numpy() for item in named if item.name == TOKEN_EMBEDDING)
        check_tied(own, copy)
    return export_weights(item for item in named if not item.is_copy)


def _dtype(path: Path) -> str:
    """float64 if the file has nothing else."""
    found: list[str] = []
    try:
        with h5py.File(path) as file:
            file.visititems(lambda _, item: found.append(str(item.dtype)) if isinstance(item, h5py.Dataset) else None)
    except Exception as error:
        raise ExchangeError(f"{path}: not HDF5: {in_one_line(error)}") from None
    return "float64" if set(found) == {"float64"} else "float32"


def _named(spec: TransformerSpec, model: keras.Sequential) -> Any:
    return named_parameters(unit_names(spec), model.layers, spec.tied_head)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], write_weights, read_weights))
