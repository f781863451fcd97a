"""A run's directory of checkpoints: list them, find the newest whole one, lock the directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.checkpoint.manifest import MANIFEST, CheckpointError
from common.checkpoint.read import verify

FOLDER = re.compile(r"step-([0-9]{8,18})")


def folder_name(steps_done: int) -> str:
    return f"step-{steps_done:08}"


def checkpoints_in(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last. Links, files and unfinished ones are none."""  # noqa: E501
    if not directory.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in directory.iterdir()
        if (match := FOLDER.fullmatch(path.name))
        and not path.is_symlink()
        and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def prune(directory: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints; the newest always stays."""
    for path in checkpoints_in(directory)[: -max(1, keep)]:
        doomed = directory / f".{path.name}.deleted"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)  # never half a checkpoint under a good name
        shutil.rmtree(doomed)


def newest(directory: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """Return the newest whole checkpoint; `report` gets a line for each newer damaged one."""
    for path in reversed(checkpoints_in(directory)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            report(str(error))
    return None


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint aside, so that its step can be saved again. Deletes nothing."""
    for number in range(1, 10_000):
        place = path.with_name(f"damaged-{path.name}-{number}")
        if not place.exists():
            return path.rename(place)
    raise CheckpointError(f"{path.parent}: holds 9999 damaged copies of {path.name}")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of `directory`, and remove what a dead run has left half-written.

    The lock is the kernel's (flock), so it goes with its process, however that ends; `.lock` says
    for people and other machines who holds it. Raises CheckpointError if another run is in there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{directory}: {error.strerror}; expected a folder that can be written"
        ) from None
    # Not the library filelock: it empties the file of whoever holds the lock when it tries to get it,
    # so the owner would need a file beside it, which would need care of its own: more lines, not less.
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{directory}: in use by {_owner(file)}; use another folder, or wait"
            ) from None
        here = os.uname().nodename
        owner = _owner(file)
        # Not every network's file system carries locks from host to host.
        if owner and owner["host"] != here:
            raise CheckpointError(
                f"{directory}: in use by {owner}; if that run is over, remove {directory / '.lock'}"
            )
        since = time.strftime("%FT%TZ", time.gmtime())
        _write_owner(file, json.dumps({"pid": os.getpid(), "host": here, "since": since}))
        try:
            remove_leftovers(directory)
            yield
        finally:
            remove_leftovers(directory)
            _write_owner(file, "")


class _Owner(dict[str, Any]):
    def __str__(self) -> str:
        return f"process {self['pid']} on {self['host']} since {self['since']}"


def _owner(file: Any) -> _Owner:
    """Return who wrote the lock last and has not released it; empty if nobody, or unknown."""
    file.seek(0)
    try:
        found = json.loads(file.read(4096))
        return _Owner({key: str(found[key])[:100] for key in ("pid", "host", "since")})
    except (ValueError, KeyError, TypeError, RecursionError):
        return _Owner()


def _write_owner(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def remove_leftovers(directory: Path) -> None:
    """Remove what dead processes left half-written. For the lock's holder, with no child."""
    for path in directory.glob(".step-*"):
        if (
            re.fullmatch(r"\.step-[0-9]{8,18}\.([0-9a-f]+\.partial|deleted)", path.name)
            and not path.is_symlink()
        ):
            shutil.rmtree(path, ignore_errors=True)
