"""Open files from untrusted places, and read what a safetensors file says it holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from common.checkpoint.manifest import MAX_HEADER_BYTES, CheckpointError, one_line
from common.io.edges import printable

DIGEST_CHUNK_BYTES = 2**20
DTYPES: Mapping[str, str] = {"F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    """Offset in the file."""


class _HeaderTensor(BaseModel):
    dtype: str = Field(max_length=16)
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=16)
    data_offsets: tuple[int, int]


ITEM_BYTES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
}
ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def read_header(file: Any, path: Path) -> dict[str, HeaderEntry]:
    """Return what a safetensors file says it holds, checked to fill it exactly, without memory for
    it. Raises CheckpointError.

    `file` must be at its beginning. Types have NumPy's name if there is one, else safetensors'.
    Raises SnapshotError.
    """
    size = os.fstat(file.fileno()).st_size
    length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: not a safetensors file of {size} bytes")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _HeaderTensor.model_validate(entry) for name, entry in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read: {one_line(error)}") from None
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        item_bytes = ITEM_BYTES.get(entry.dtype)
        if item_bytes is None:
            raise CheckpointError(f"{path}: {printable(name)} has dtype {printable(entry.dtype)}")
        if entry.data_offsets != (end, end + math.prod(entry.shape) * item_bytes):
            raise CheckpointError(
                f"{path}: {printable(name)} lies at {entry.data_offsets}, which its shape does "
                "not fill"
            )
        end = entry.data_offsets[1]
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: its tensors have {end} bytes; the file has {size - 8 - length} for them"
        )
    return {
        name: HeaderEntry(
            DTYPES.get(entry.dtype, entry.dtype), entry.shape, 8 + length + entry.data_offsets[0]
        )
        for name, entry in entries.items()
    }


@contextlib.contextmanager
def opened(path: Path, follow_links: bool = False) -> Iterator[Any]:
    """Open a regular file, no device; a link only if the user named it. Raises CheckpointError."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = "a link" if path.is_symlink() else error.strerror
        raise CheckpointError(f"{path}: {reason}; expected a file of a checkpoint") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a plain file; expected a file of a checkpoint")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def digest_of(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(DIGEST_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
