"""Where a rank keeps what it writes, and the checkpoint that it goes on from.

Rank 0 chooses the run's folder and that of its checkpoints. A host that sees the same folder uses
it. One that does not has folders of its own, and moves files (`common.checkpoint.depot`):

    saving      its shards go to rank 0's host, where the checkpoint becomes whole
    resuming    it fetches the checkpoint from there; or rank 0 does from it, if it has a newer one:
                launchers that start all anew may give another host rank 0
"""

from __future__ import annotations

import contextlib
import time
import uuid
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from common import checkpoint
from common.cli import train
from common.harness.bench import make_folder
from common.io.console import say
from common.io.edges import write_file
from common.runtime.meeting import POLL_SECONDS, agree
from common.runtime.world import World

SEEN_SECONDS = 5.0
"""How long another host's file may take to show in a shared folder."""


@dataclass(frozen=True)
class Folders:
    """As this rank knows them."""

    folder: Path
    """The run's: results and logs."""
    directory: Path
    """Of checkpoints."""
    token: str
    resume: Path | None
    depot: str | None = None
    """Where shards go, on a host with a `directory` of its own."""

    @property
    def seen(self) -> Path:
        """The file by which a host knows that the folder is rank 0's."""
        return self.directory / f".seen-{self.token}"


def choose_folders(
    world: World, arguments: Namespace, console: Console, stack: contextlib.ExitStack
) -> Folders:
    """Let rank 0 choose for all, and let hosts that share no folder with it have what it has. Locks
    and depots live as long as `stack`. Raises UsageError, in all ranks, if one cannot.
    """
    room, asked = world.room, arguments.resume or arguments.weights
    assert room is not None

    def choose() -> dict[str, str]:
        return {} if world.rank else _choose(arguments, console, stack)

    said = agree(room, world.hosts, "plan", choose)[0]
    resume = Path(said["resume"]) if said["resume"] else None
    chosen = Folders(Path(said["folder"]), Path(said["directory"]), said["token"], resume)
    is_shared = _is_seen(chosen)
    folders = chosen if is_shared else _own(chosen, arguments)
    # Whose folders this rank uses: rank 0's, or those of its host's first process.
    holder = 0 if is_shared else world.hosts.index(world.hosts[world.rank])

    def look() -> dict[str, str]:
        if is_shared or holder != world.rank:
            return {"shares": str(is_shared)}
        stack.enter_context(checkpoint.locked(folders.directory))
        newest = checkpoint.newest(folders.directory) if asked == "latest" else None
        return {"shares": "False", "newest": "" if newest is None else newest.name}

    everybody = agree(room, world.hosts, "folders", look)
    if world.rank == 0:
        chosen.seen.unlink()
    if all(facts["shares"] == "True" for facts in everybody):
        return folders
    # step-00000200 of host b against step-00000100 of rank 0's host: names sort as their steps do.
    names = [facts.get("newest", "") for facts in everybody]
    names[0] = "" if resume is None else resume.name
    source = names.index(max(names)) if asked == "latest" else 0
    if source and world.rank == source:
        resume = folders.directory / names[source]

    def offer() -> dict[str, str]:
        if world.rank not in (0, source):
            return {}
        offered = resume if world.rank == source else None
        own = world.hosts[world.rank]
        serving = checkpoint.open_depot(own, chosen.token, folders.directory, offered)
        return {"address": stack.enter_context(serving)}

    addresses = [facts.get("address", "") for facts in agree(room, world.hosts, "depots", offer)]
    if not is_shared:
        folders = replace(folders, depot=addresses[0])
    if not names[source]:
        return replace(folders, resume=None)
    if source:
        where = f"rank {source} ({world.hosts[source]})"
        say(console, f"going on from {names[source]} of {where}, the newest")

    def fetch() -> dict[str, str]:
        if holder != world.rank:
            return {}
        if world.rank == source:
            return {"resume": str(resume)}
        # Another training's weights are not to be taken for the newest of this one.
        place = folders.directory if asked == "latest" else folders.folder / "start"
        path = checkpoint.fetch(addresses[source], place, f"{chosen.token}{world.rank:04x}")
        checkpoint.prune(place, arguments.keep)
        return {"resume": str(path)}

    fetched = agree(room, world.hosts, "fetched", fetch)
    return replace(folders, resume=Path(fetched[holder]["resume"]))


def _choose(arguments: Namespace, console: Console, stack: contextlib.ExitStack) -> dict[str, str]:
    """Rank 0's choice."""
    directory = train.save_directory(arguments)
    asked, resume = arguments.resume or arguments.weights, None
    if directory is not None:
        stack.enter_context(checkpoint.locked(directory))
    # A launcher that starts all anew repeats the command line of the first start.
    if asked != "latest" or (directory and checkpoint.checkpoints_in(directory)):
        resume = train.choose(asked, directory, console)
    if directory is not None:
        train.check_room(directory, None if arguments.weights else resume)
    folder = make_folder(Path(arguments.out), "train").resolve()
    directory = (directory or folder / "checkpoints").resolve()
    token = uuid.uuid4().hex
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / f".seen-{token}", "")
    return {
        "folder": str(folder),
        "directory": str(directory),
        "token": token,
        "resume": "" if resume is None else str(resume.resolve()),
    }


def _own(chosen: Folders, arguments: Namespace) -> Folders:
    """The folders that this host's command line names."""
    folder = Path(arguments.out).resolve() / chosen.folder.name
    directory = train.save_directory(arguments)
    return replace(chosen, folder=folder, directory=(directory or folder / "checkpoints").resolve())


def _is_seen(chosen: Folders) -> bool:
    """Whether the folder of checkpoints is here what it is in rank 0."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := chosen.seen.exists()):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return seen
