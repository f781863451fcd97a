"""What took long to make and is kept in the user's cache folder, by the digest of what it is made
of: `$XDG_CACHE_HOME/triptych`, `~/.cache/triptych` without that variable.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from io import BufferedRandom, BufferedReader
from pathlib import Path

NO_CACHE = (OSError, RuntimeError)
"""What `keep` raises where nothing can be kept; RuntimeError: there is no home."""


def find_kept(kind: str, key: str, suffix: str) -> Path | None:
    """Return the file that was kept under this key, if there is one and it is whole."""
    with contextlib.suppress(*NO_CACHE):
        for path in kept_in(kind).glob(f"{key}-*{suffix}"):
            with path.open("rb") as file:
                if path.name == _name(key, file, suffix):
                    return path
    return None


def keep(kind: str, key: str, suffix: str, write: Callable[[BufferedRandom], object]) -> Path:
    """Return the file under this key, which `write` fills if it is not there yet.

    It gets its name only when it is whole and on the disk. Of several processes one writes, and
    the others wait for it. Raises OSError and RuntimeError, and what `write` raises.
    """
    folder = kept_in(kind)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{key}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel's: it goes with its process
        if (kept := find_kept(kind, key, suffix)) is not None:
            return kept
        # Always the same name: what a killed process left is overwritten.
        partial = folder / f".{key}.partial"
        try:
            with partial.open("w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                return partial.rename(folder / _name(key, file, suffix))
        except BaseException:  # Ctrl-C too: it may be large
            partial.unlink(missing_ok=True)
            raise


def _name(key: str, file: BufferedReader | BufferedRandom, suffix: str) -> str:
    """The name has the digest of the content, too, to detect damage."""
    file.seek(0)
    return f"{key}-{hashlib.file_digest(file, 'sha256').hexdigest()}{suffix}"


def kept_in(kind: str) -> Path:
    """Return the folder of one kind of file. Raises RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych" / kind
