"""The dump of one step, a safetensors file that anybody can write and read (docs/numerics.md).

Tensors are named by `common.spec.parameters.TensorKey`. Nothing in a dump is trusted: it is never
unpickled, its header must describe the file exactly before a tensor is read, and its metadata is
checked like any other input.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.checkpoint import CheckpointError
from common.checkpoint.header import read_header
from common.io.edges import printable
from common.io.usage import UsageError
from common.spec.parameters import TensorKey
from common.spec.run import RunConfig, explain

FORMAT = "triptych-dump"
SCHEMA_VERSION = 1
READABLE = {"float64": "F64", "float32": "F32", "F16": "F16", "I64": "I64", "I32": "I32"}
"""Types that NumPy has too, by the names of `read_header` and of safetensors."""


class DumpError(UsageError):
    """A file that is not a dump, or cannot be compared; its text is one line."""


@dataclass(frozen=True)
class Dump:
    """One step of one implementation."""

    name: str
    """The implementation that made it, as tables show it."""
    step: int
    config: RunConfig | None
    """None if a port did not give it; then the other dump's is used."""
    tensors: Mapping[TensorKey, NDArray[Any]]


def write_dump(
    path: Path,
    tensors: Mapping[TensorKey, NDArray[Any]],
    config: RunConfig,
    name: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write `tensors` of one step. `about` (such as versions) is for readers only."""
    metadata = {
        "format": FORMAT,
        "schema_version": str(SCHEMA_VERSION),
        "name": name,
        "config": config.model_dump_json(),
        "about": json.dumps(dict(about or {}), default=str),
    }
    try:
        save_file(
            {str(key): np.ascontiguousarray(value) for key, value in tensors.items()},
            path,
            metadata,
        )
    except SafetensorError as error:  # how it says that a disk is full
        raise DumpError(f"{path}: {error}") from None


def read_dump(path: Path) -> Dump:
    """Read a dump. Raises DumpError, and OSError for a file that cannot be opened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DumpError(f"{path}: not a plain file; expected a dump")
    try:
        entries = read_header(path)
    except CheckpointError as error:
        raise DumpError(str(error)) from None
    for text, entry in entries.items():
        if entry.dtype not in READABLE:
            raise DumpError(
                f"{path}: {printable(text)} has dtype {entry.dtype}; expected "
                f"{', '.join(READABLE.values())}"
            )
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {_key(path, text): opened.get_tensor(text) for text in entries}
    except SafetensorError as error:
        raise DumpError(f"{path}: {error}") from None
    # A file is one step: with several, nobody could say which of them differs first.
    steps = {key.step for key in tensors}
    if len(steps) != 1:
        raise DumpError(
            f"{path}: holds tensors of steps {sorted(steps)}; expected those of one step"
        )
    if (version := metadata.get("schema_version", str(SCHEMA_VERSION))) != str(SCHEMA_VERSION):
        raise DumpError(
            f"{path}: schema_version = {version[:20]!r}; this program reads {SCHEMA_VERSION}"
        )
    name = " ".join(metadata.get("name", path.stem).split())[:60]
    return Dump(name, steps.pop(), _config(path, metadata.get("config")), tensors)


def _key(path: Path, text: str) -> TensorKey:
    try:
        return TensorKey.parse(text)
    except ValueError:
        right = TensorKey(0, "forward", 0, 0, "head", "output")
        raise DumpError(
            f"{path}: {text[:80]!r} is no tensor key; expected such as {right}"
        ) from None


def _config(path: Path, text: str | None) -> RunConfig | None:
    if text is None:
        return None
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise DumpError(f"{path}: its configuration: {explain(error).splitlines()[0]}") from None
