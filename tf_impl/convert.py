"""Weights as Keras' own file, and back: `python -m tf_impl.convert`
(`common.checkpoint.foreign.converter`).

The file is that of `plain_model`, an ordinary Keras model without a pipeline:

    model = plain_model(spec)
    model.load_weights("model.weights.h5")
    logits = model(tokens)  # (B, S) -> (B, S, V)
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
from numpy.typing import NDArray

from common.checkpoint import Arrays
from common.checkpoint.foreign.converter import (
    OVERHEAD_BYTES,
    check_tied,
    in_one_line,
    main,
    note_dtypes,
)
from common.checkpoint.foreign.errors import ExchangeError
from common.io.edges import printable
from common.spec.parameters import TOKEN_EMBEDDING, unit_names
from common.spec.run import TransformerSpec
from tf_impl.layers import build_unit
from tf_impl.weights import export_weights, load_weights, named_parameters

_SUFFIXES = (".weights.h5", ".keras", ".h5")
_WEIGHTS = "model.weights.h5"
"""The file in a .keras archive that has the weights."""
_MAX_UNPACKED = 20
"""Times the archive's size: Keras does not compress, and weights hardly become smaller."""


def plain_model(spec: TransformerSpec, dtype: str = "float32") -> keras.Sequential:
    """Return the model whose weights these files hold, still to be loaded.

    It has no dropout: that takes the harness' masks.
    """
    inputs = keras.Input((spec.context_length,), dtype="int64")
    return keras.Sequential([inputs, *(build_unit(spec, name, dtype) for name in unit_names(spec))])


def write_weights(spec: TransformerSpec, weights: Arrays, path: Path) -> None:
    """Write the file with `save_weights`."""
    if not path.name.endswith(".weights.h5"):
        raise ExchangeError(f"{path}: Keras wants a name that ends in .weights.h5")
    model = plain_model(spec, str(weights[TOKEN_EMBEDDING].dtype))
    load_weights(_named(spec, model), weights)
    model.save_weights(path, overwrite=True)


def read_weights(spec: TransformerSpec, path: Path) -> Mapping[str, NDArray[Any]]:
    """Read a file of `plain_model`, or what `model.save` writes of it. Raises ExchangeError.

    HDF5 holds no code. A .keras archive may, in its configuration, so its weights alone are read.
    """
    if not path.name.endswith(_SUFFIXES):
        raise ExchangeError(f"{path}: Keras wants a name that ends in .weights.h5, .keras or .h5")
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        file = _unpacked(path, Path(folder)) if path.suffix == ".keras" else path
        model = plain_model(spec, _dtype(file))
        try:
            model.load_weights(file)
        except Exception as error:  # HDF5 can be wrong in every way
            raise ExchangeError(
                f"{path}: not the weights of this model: {in_one_line(error)}"
            ) from None
    named = _named(spec, model)
    if spec.tied_head:  # the file has the token embedding twice, as the plain model has
        own, copy = (item.parameter.numpy() for item in named if item.name == TOKEN_EMBEDDING)
        check_tied(own, copy)
    return export_weights(item for item in named if not item.is_copy)


def _unpacked(path: Path, folder: Path) -> Path:
    """The weights of a .keras archive, as a file of their own. Raises ExchangeError."""
    try:
        with zipfile.ZipFile(path) as archive:
            size, packed = archive.getinfo(_WEIGHTS).file_size, path.stat().st_size
            if size > _MAX_UNPACKED * packed + OVERHEAD_BYTES:
                raise ExchangeError(
                    f"{path}: {_WEIGHTS} in it has {size} bytes, packed in {packed}"
                )
            return Path(archive.extract(_WEIGHTS, folder))
    except ExchangeError:
        raise
    except Exception as error:  # an archive can be wrong in every way
        raise ExchangeError(f"{path}: no archive of Keras: {in_one_line(error)}") from None


def _dtype(path: Path) -> str:
    """float64 if the file has no other floating type. Raises ExchangeError; no link is followed."""
    links: dict[str, Any] = {}
    found: set[str] = set()
    try:
        with h5py.File(path) as file:
            file.visititems_links(lambda name, link: links.update({name: link}))
            # HDF5 can lead to other files in three ways: by links, and by data that is external
            # or virtual. None is followed.
            for name, link in links.items():
                item = file[name] if isinstance(link, h5py.HardLink) else None
                own = not isinstance(item, h5py.Dataset) or not (item.external or item.is_virtual)
                if isinstance(link, h5py.ExternalLink) or not own:
                    raise ExchangeError(f"{path}: {printable(name)} leads to another file")
                if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
                    found.add(str(item.dtype))
    except ExchangeError:
        raise
    except Exception as error:
        raise ExchangeError(f"{path}: not HDF5: {in_one_line(error)}") from None
    note_dtypes(sorted(found))
    return "float64" if found == {"float64"} else "float32"


def _named(spec: TransformerSpec, model: keras.Sequential) -> Any:
    return named_parameters(unit_names(spec), model.layers, spec.tied_head)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], write_weights, read_weights))
