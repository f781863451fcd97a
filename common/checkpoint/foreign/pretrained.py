"""A model of the transformers library in local files: what its architectures share.

The tensors are in safetensors files, each checked by its header before it is read; what the shapes
do not show is in config.json. The head's weight is stored, or the token embedding is in its place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import safe_open

from common.checkpoint import HeaderEntry, opened, read_header
from common.checkpoint.foreign.converter import check_names
from common.checkpoint.foreign.errors import ExchangeError, note
from common.checkpoint.foreign.names import unwrapped
from common.checkpoint.foreign.source import Source, read_bounded
from common.checkpoint.manifest import one_line
from common.io.edges import printable
from common.spec.run import TransformerSpec

HEAD = "lm_head.weight"
MAX_CONFIG_BYTES = 2**20
Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model's files, by their names without what wraps these."""

    path: Path
    """The first file, for messages."""
    headers: Mapping[str, tuple[Path, HeaderEntry]]
    names: Mapping[str, str]
    """From the names used here to the files' own."""

    @classmethod
    def of(
        cls, files: Sequence[Path], prefixes: tuple[str, ...], buffers: re.Pattern[str]
    ) -> Tensors:
        """Read the headers; `buffers` are no weights. Raises ExchangeError and CheckpointError."""
        headers: dict[str, tuple[Path, HeaderEntry]] = {}
        for path in files:
            with opened(path, follow_links=True):  # no pipe, and no device
                entries = read_header(path)
            for name, entry in entries.items():
                if name in headers:
                    both = f"{headers[name][0].name} and {path.name}"
                    raise ExchangeError(f"{printable(name)} is in both {both}")
                headers[name] = path, entry
        names = unwrapped(headers, prefixes)
        names = {short: name for short, name in names.items() if not buffers.fullmatch(short)}
        for name in names.values():
            dtype = headers[name][1].dtype
            if dtype not in ("float32", "float64", "F16", "BF16"):
                raise ExchangeError(
                    f"{files[0]}: {printable(name)} has dtype {dtype}; expected float32"
                )
        return cls(files[0], headers, names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {short: self.headers[name][1].shape for short, name in self.names.items()}

    def read(self, short: str) -> NDArray[Any]:
        """Return a tensor; one of bfloat16, a type that NumPy lacks, as float32."""
        name = self.names[short]
        path, entry = self.headers[name]
        if entry.dtype == "BF16":  # the upper half of a float32
            with path.open("rb") as file:
                # 8 bytes of length, a header in JSON, the tensors: their offsets count from here.
                length = int.from_bytes(file.read(8), "little")
                first_byte = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
            bits = np.fromfile(path, "<u2", math.prod(entry.shape), offset=first_byte)
            return (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
        with safe_open(path, "numpy") as found:
            return np.asarray(found.get_tensor(name))


def read_config(source: Source, kind: type[Config]) -> Config | None:
    """Return the config.json, None without one. Raises ExchangeError."""
    path = source.beside("config.json")
    if path is None:
        return None
    try:
        return kind.model_validate_json(read_bounded(path, MAX_CONFIG_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        given = "" if first["type"] == "missing" else f", not {printable(repr(first['input']))}"
        raise ExchangeError(f"{path}: {one_line(error)}{given}") from None


def read_weights(
    tensors: Tensors, spec: TransformerSpec, shapes: Mapping[str, tuple[int, ...]], embedding: str
) -> tuple[TransformerSpec, dict[str, NDArray[Any]]]:
    """Return the tensors of these shapes, and HEAD if the head is not tied, with the model.

    A model that should be tied is not if its head differs from the embedding. Raises ExchangeError.
    """
    check_names({*tensors.names} - {HEAD}, set(shapes))
    for name, shape in shapes.items():
        found = tensors.shapes[name]
        if found != shape:
            raise ExchangeError(
                f"{tensors.path}: {name} has shape {list(found)}; expected {list(shape)}"
            )
    if HEAD not in tensors.names and not spec.tied_head:
        raise ExchangeError(
            f"{tensors.path}: {HEAD} is missing; expected it where tie_word_embeddings is false"
        )
    arrays = {name: tensors.read(name) for name in shapes}
    if HEAD in tensors.names:
        head = tensors.read(HEAD)
        if spec.tied_head and not np.array_equal(head, arrays[embedding]):
            spec = spec.model_copy(update={"tied_head": False})
            note("the head is not tied: it differs from the token embedding")
        if not spec.tied_head:
            arrays[HEAD] = head
    return spec, arrays
