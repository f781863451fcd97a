"""A run's directory of checkpoints: list them, find the newest whole one, lock the directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.checkpoint.manifest import MANIFEST, CheckpointError
from common.checkpoint.read import verify
from common.io.edges import write_file

TOUCH_SECONDS, GONE_SECONDS = 5.0, 30.0
"""How often a lock's holder touches it, and how long it must not have for another host to take it:
a run goes on where its launcher finds processes, without the host that is gone.
"""
FOLDER = re.compile(r"step-([0-9]{8,18})")


def folder_name(steps_done: int) -> str:
    return f"step-{steps_done:08}"


def checkpoints_in(directory: Path) -> list[Path]:
    """Return a run's checkpoints, the newest last. Links, files and unfinished ones are none."""
    if not directory.is_dir():
        return []
    # By number and not by name: a step beyond 99,999,999 has more digits.
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
    for people and other machines who holds it, and is touched while its holder lives. Raises
    CheckpointError if another run is in there.
    """
    lock, here = directory / ".lock", os.uname().nodename
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = lock.open("a", encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror}; expected a folder that can be written"
        raise CheckpointError(f"{directory}: {reason}") from None
    with file:
        # All that the library filelock would take off our hands is this line; who holds the lock it
        # does not say either.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            in_use = f"in use by {_owner(lock)}; use another folder, or wait"
            raise CheckpointError(f"{directory}: {in_use}") from None
        # Not every network's file system carries locks from host to host.
        owner = _owner(lock)
        if owner and owner["host"] != here and _is_touched(lock):
            in_use = f"in use by {owner}; use another folder, or wait"
            raise CheckpointError(f"{directory}: {in_use}")
        since = time.strftime("%FT%TZ", time.gmtime())
        own = json.dumps({"pid": os.getpid(), "host": here, "since": since})
        write_file(lock, own)
        over = threading.Event()
        touching = threading.Thread(target=_touch, args=(lock, own, over), name="lock", daemon=True)
        touching.start()
        try:
            remove_leftovers(directory)
            yield
        finally:
            over.set()
            touching.join()
            remove_leftovers(directory)
            write_file(lock, "")


def _touch(lock: Path, own: str, over: threading.Event) -> None:
    """Show that this process lives. End it where another host has taken the lock meanwhile."""
    while not over.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):  # the disk may be away for a while
            if lock.read_text(encoding="utf-8") == own:
                os.utime(lock)
            elif owner := _owner(lock):
                stopped = f"this one had given no sign of life for {GONE_SECONDS:g} s"
                print(
                    f"{lock.parent}: now in use by {owner}; {stopped}", file=sys.stderr, flush=True
                )
                os._exit(1)


def _is_touched(lock: Path) -> bool:
    """Wait for a sign of life from another host's process, whatever the clocks there say."""

    def touched() -> int:
        # Opened, since a network's file system may answer from memory otherwise.
        with lock.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    before, deadline = touched(), time.monotonic() + GONE_SECONDS
    while touched() == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(TOUCH_SECONDS / 10)
    return True


class _Owner(dict[str, Any]):
    def __str__(self) -> str:
        return f"process {self['pid']} on {self['host']} since {self['since']}"


def _owner(lock: Path) -> _Owner:
    """Return who wrote the lock last and has not released it; empty if nobody, or unknown."""
    try:
        found = json.loads(lock.read_bytes()[:4096])
        return _Owner({key: str(found[key])[:100] for key in ("pid", "host", "since")})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _Owner()


def remove_leftovers(directory: Path) -> None:
    """Remove what dead processes left half-written. For the lock's holder, with no worker."""
    for path in directory.glob(".step-*"):
        if (
            re.fullmatch(r"\.step-[0-9]{8,18}\.([0-9a-f]+\.partial|deleted)", path.name)
            and not path.is_symlink()
        ):
            shutil.rmtree(path, ignore_errors=True)
