"""A sign of life from every process of a run, and an end of all where one is missing.

Frameworks notice a process that dies, since its connections break. They do not notice one that
hangs, or a cut cable: gloo waits for half an hour. So every process has a thread that counts in the
run's store, once a second, and says what its device is doing (`common.runtime.watch`):

    every rank    beat/r = 17 F0, 18 BW0, ...  ────►  rank 0 watches all counters and places
    every rank    ends with it                 ◄────  verdict = "lost rank 3 (host-b): ..."

and every rank watches rank 0's. Where all count and no place changes, they wait for each other: a
hang. One that fails says why in place of its count, and rank 0 passes it on. Who cannot reach the
store, or gets no answer, is cut off and ends too. The end is `os._exit` behind one line, since the
main thread may wait inside the framework for ever; the launcher sees the status and may start anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.runtime.meeting import POLL_SECONDS, Room

BEAT_SECONDS = 1.0
LOST_SECONDS = 15.0
"""Without a sign of life for so long, a process is lost. torchrun gives its agents as long."""
START_SECONDS = 120.0
"""The least that all get to build the model before they can hang."""
FAILED, DONE = "failed: ", "done"


@dataclass(frozen=True)
class Places:
    """How rank 0 sees a hang in which every process is alive. By elapsed time, not by that of
    CPUs: one that waits for a GPU may compute all the while.
    """

    own: Callable[[], str]
    """What this process' device is doing, without a space; empty before it begins."""
    hang_seconds: float
    who_waits: Callable[[Sequence[str]], str]
    """(every rank's place) -> who hangs, and who waits for whom."""


NOWHERE = Places(lambda: "", float("inf"), lambda places: "")


class Heartbeat:
    """This process' part. `names` are those of the ranks in messages; `end` is called with the line
    in the thread that finds something.
    """

    def __init__(
        self, room: Room, names: Sequence[str], end: Callable[[str], None], places: Places = NOWHERE
    ) -> None:
        # Two threads use these, `_beat` and `_watch`; each field has one that writes it.
        self._room, self._names, self._end, self._of = room, names, end, places
        self.name = names[room.rank]
        self._places, self._before = [""] * room.size, [""] * room.size
        self._moved = time.monotonic()
        # A star: rank 0 watches all, all watch rank 0: 2 n looks a second for n processes, not n^2.
        watched = range(1, room.size) if room.rank == 0 else range(1)
        # By rank: what it said last, and when that was new.
        self._last = {rank: ("", time.monotonic()) for rank in watched}
        self._count, self._words, self._error = 0, "", ""
        self._answered = time.monotonic()
        self._over = False
        self._stopped, self._said = threading.Event(), threading.Event()

    def start(self) -> None:
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def give_way(self) -> None:
        """Where the run is over already, let the thread that knows why end this process: what comes
        after, as a broken connection, is not the cause.
        """
        while self._over:
            time.sleep(POLL_SECONDS)

    def fail(self, line: str) -> None:
        """Tell the others; return when all can have read it, a beat to rank 0 and one from it."""
        self._say(FAILED + line, 2 * BEAT_SECONDS)

    def finish(self) -> None:
        """Say that this process ends well; rank 0, which may hold the store, after the others."""
        # Rank 0 leaves last, since its end may be that of the store; but not later than it must.
        deadline = time.monotonic() + 5 * BEAT_SECONDS
        while self._room.rank == 0 and self._last and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._say(DONE, 0)

    def _say(self, words: str, linger_seconds: float) -> None:
        self._words = words
        self._said.clear()
        if self._said.wait(3 * BEAT_SECONDS):
            time.sleep(linger_seconds)
        self._stopped.set()

    def round(self, now: float) -> str | None:
        """Give one sign of life and look at the others'; return why the run must end, or None."""
        words, self._count = self._words, self._count + 1
        # "17 F0": the count says that this process lives, the place that its device moves.
        own = self._places[self._room.rank] = self._of.own()
        self._room.set(f"beat/{self._room.rank}", words or f"{self._count} {own}")
        # Rank 0 judges and writes the verdict down; the others read it, and judge rank 0.
        verdict = self._look(now) if self._room.rank == 0 else self._room.get("verdict")
        if self._room.rank == 0 and (line := words.removeprefix(FAILED)) != words:
            verdict = f"{self._names[0]}: {line}"
        if self._room.rank == 0 and verdict:
            self._room.set("verdict", verdict)
        if self._room.rank != 0 and not verdict:
            verdict = self._look(now)
        self._answered = now
        if words:
            self._said.set()
        return verdict

    def _look(self, now: float) -> str | None:
        for rank, (before, since) in list(self._last.items()):
            said = self._room.get(f"beat/{rank}") or ""
            if said == DONE:
                del self._last[rank]
            elif said.startswith(FAILED):
                return f"{self._names[rank]}: {said.removeprefix(FAILED)}"
            elif said != before:
                self._last[rank] = said, now
            # By this process' own clock alone: clocks of two hosts are never compared.
            elif now - since > LOST_SECONDS:
                return f"lost {self._names[rank]}: no sign of life for {LOST_SECONDS:g} s"
            self._places[rank] = said.partition(" ")[2]
        if self._places != self._before:
            self._before, self._moved = list(self._places), now
        limit = self._of.hang_seconds
        # Until every rank has begun, building and compiling may take its time.
        limit = limit if all(self._places) else max(limit, START_SECONDS)
        if self._room.rank == 0 and now - self._moved > limit:
            who = self._of.who_waits(self._places)
            return f"no progress for {limit:g} s (--hang-timeout): {who}"
        return None

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                verdict = self.round(time.monotonic())
            except Exception as error:  # perhaps the next time it answers
                self._error = f" ({_one_line(error)})"
                continue
            if verdict and not self._stopped.is_set() and not self._words:
                self._over = True
                self._end(verdict)
                return

    def _watch(self) -> None:
        """In a thread of its own: a store behind a cut cable may not answer at all."""
        while not self._stopped.wait(BEAT_SECONDS):
            if time.monotonic() - self._answered > LOST_SECONDS:
                self._end(
                    f"the store of the run has not answered for {LOST_SECONDS:g} s{self._error}: "
                    "this host, or that of the store, is cut off"
                )
                return


def end_process(
    name: str, note: Callable[[str], None], clean_up: Callable[[], None], linger_seconds: float
) -> Callable[[str], None]:
    """Return what ends this process, noted and cleaned up, with a line on stderr and status 1,
    after a while, where its end is the store's and the others have yet to read why.
    """

    def end(line: str) -> None:
        with contextlib.suppress(Exception):
            note(line)
        with contextlib.suppress(Exception):
            clean_up()
        with contextlib.suppress(OSError):
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        time.sleep(linger_seconds)
        os._exit(1)

    return end


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
