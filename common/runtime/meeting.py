"""How the processes of a run find each other: over the store of their launcher, or of rank 0.

A store is a dictionary that all processes reach. torchrun's outlives the processes and has the
words of those that died before a restart, so the first thing is a name for this run that none of
them knew:

    rank r                            store                           rank 0
    hello/r = a new word       ────►                    ────►         reads it
    waits for welcome/word     ◄────  welcome/word = run  ◄────       the run's name, new too
    run/who/r = its facts      ────►                    ────►         waits for all ranks' facts
    waits for run/who/all      ◄────                    ◄────         all are here, or who is not

From then on all keys begin with the run's name. `exchange` is the second half, again and again:
everybody says something, and gets what everybody said.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.io.usage import UsageError

POLL_SECONDS = 0.05

Facts = Mapping[str, str]


class Store(Protocol):
    """Text by key. Both methods raise an error if the store is out of reach."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> str | None:
        """Return the value, or None if there is none yet; never wait for one."""


class Absent(UsageError):
    """A process that did not come, or did not answer."""


@dataclass(frozen=True)
class Room:
    """Where the processes of one run meet. `seconds` is how long each waits for the others."""

    store: Store
    run: str
    rank: int
    size: int
    seconds: float

    def set(self, key: str, value: str) -> None:
        self.store.set(f"{self.run}/{key}", value)

    def get(self, key: str) -> str | None:
        return self.store.get(f"{self.run}/{key}")

    def exchange(self, about: str, own: Facts) -> list[dict[str, str]]:
        """Return what every rank says, by rank. Raises Absent, in all of them, if one is silent."""
        self.set(f"{about}/{self.rank}", json.dumps(dict(own)))
        deadline = time.monotonic() + self.seconds
        if self.rank == 0:
            # Rank 0 collects, then says one word to all: "" for complete, else who is missing.
            silent = set(range(self.size))
            while silent:
                silent -= {r for r in silent if self.get(f"{about}/{r}") is not None}
                if silent and time.monotonic() > deadline:
                    line = _who(silent, self.seconds)
                    self.set(f"{about}/all", line)
                    raise Absent(line)
                time.sleep(POLL_SECONDS if silent else 0)
            self.set(f"{about}/all", "")
        # A little longer than rank 0, whose line says more.
        late = _wait(self, f"{about}/all", deadline + 5)
        if late is None:
            raise Absent(_who({0}, self.seconds))
        if late:
            raise Absent(late)
        return [json.loads(self.get(f"{about}/{r}") or "{}") for r in range(self.size)]


def agree(
    room: Room, hosts: Sequence[str], about: str, work: Callable[[], Facts]
) -> list[dict[str, str]]:
    """Do this rank's part; return what all say. Raises UsageError in all where one could not."""
    own: Facts
    try:
        own = work()
    except (UsageError, OSError) as error:
        own = {"refused": " ".join(str(error).split())}
    everybody = room.exchange(about, own)
    for rank, facts in enumerate(everybody):
        if "refused" in facts:
            where = "" if rank == 0 else f"rank {rank} ({hosts[rank]}): "
            raise UsageError(where + facts["refused"])
    return everybody


def meet(
    store: Store, rank: int, size: int, own: Facts, seconds: float
) -> tuple[Room, list[dict[str, str]]]:
    """Return this run's room and the facts of all ranks, once all are here.

    Raises Absent, in all that are here, if one does not come within `seconds`; UsageError if two
    processes have one rank.
    """
    word = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    run: str | None = word
    if rank == 0:
        answered: dict[int, str] = {}
        coming = set(range(1, size))
        while coming:
            for other in sorted(coming):
                hello = store.get(f"hello/{other}")
                # A word from before a restart is answered too, and nobody reads the answer.
                if hello is not None and answered.get(other) != hello:
                    store.set(f"welcome/{hello}", word)
                    answered[other] = hello
                if store.get(f"{word}/who/{other}") is not None:
                    coming.discard(other)
            if coming and time.monotonic() > deadline:
                line = _who(coming, seconds)
                store.set(f"{word}/who/all", line)
                raise Absent(line)
            time.sleep(POLL_SECONDS if coming else 0)
    else:
        store.set(f"hello/{rank}", word)
        run = _wait(store, f"welcome/{word}", deadline)
        if run is None:
            raise Absent(_who({0}, seconds))
    assert run is not None
    room = Room(store, run, rank, size, seconds)
    everybody = room.exchange("who", {**own, "word": word})
    if everybody[rank]["word"] != word:
        raise UsageError(
            f"rank {rank} is here twice, on {everybody[rank].get('host')} and {own.get('host')}; "
            "expected another rank for each process (--node-rank)"
        )
    return room, everybody


def _wait(store: Store | Room, key: str, deadline: float) -> str | None:
    while (found := store.get(key)) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return found


def _who(ranks: set[int], seconds: float) -> str:
    names = ", ".join(map(str, sorted(ranks)))
    return (
        f"rank{'s' * (len(ranks) > 1)} {names} did not come within {seconds:g} s (--join-timeout)"
    )


def disagreement(everybody: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """Return who differs from rank 0 in what, in one line; None if all say the same."""
    first = everybody[0]
    for rank, facts in enumerate(everybody):
        different = [key for key in {**first, **facts} if facts.get(key) != first.get(key)]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            return (
                f"rank {rank} ({hosts[rank]}) has {key} = {facts.get(key)}{more}; expected "
                f"{first.get(key)}, as rank 0 ({hosts[0]}) has"
            )
    return None
