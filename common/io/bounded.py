"""Read text files that could be anything: a disk image by mistake, an endless device."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 64 * 2**20


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a file as UTF-8, with or without a byte-order mark.

    Raises OSError, also for more than `max_bytes`, and UnicodeDecodeError.
    """
    with path.open("rb") as file:
        return read_stream(file, str(path), max_bytes)


def read_stream(file: BinaryIO, name: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the same for an open file, which an error calls `name`."""
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: more than {max_bytes} bytes", name)
    return data.decode("utf-8-sig")
