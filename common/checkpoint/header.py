"""Open files from untrusted places, and read what a safetensors file says it holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.checkpoint.manifest import CheckpointError, one_line
from common.io.edges import printable

DIGEST_CHUNK_BYTES = 2**20
DTYPES: Mapping[str, str] = {"F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return what a safetensors file says it holds, without reading a tensor.

    Types have NumPy's name if there is one, else safetensors'. Raises CheckpointError: the library
    refuses a header that cannot be read, types that it does not know, and tensors that do not fill
    the file exactly, one behind the other.
    """
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: HeaderEntry(DTYPES.get(dtype, dtype), tuple(each.get_shape()))
                for name, each in slices.items()
                for dtype in [each.get_dtype()]
            }
    except (SafetensorError, OSError) as error:
        reason = printable(one_line(error).removeprefix("Error while deserializing header: "), 200)
        raise CheckpointError(f"{path}: not a safetensors file: {reason}") from None


@contextlib.contextmanager
def opened(path: Path, follow_links: bool = False) -> Iterator[Any]:
    """Open a regular file, no device; a link only if the user named it. Raises CheckpointError."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = "a link" if path.is_symlink() else error.strerror
        raise CheckpointError(f"{path}: {reason}; expected a file of a checkpoint") from None
    # Without O_NONBLOCK the open above would wait for somebody to write into a pipe.
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
