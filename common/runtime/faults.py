"""Faults on purpose, to see what a run makes of one: `--fault kill@device=1,step=3,action=BW2`.

    exception@...   the action raises
    kill@...        SIGKILL to the process that holds the device
    hang@...        the action never ends
    oom@...         the process allocates, under a limit just above what it uses, until there is no more
    disk-full@...   from here on no file of this process may grow beyond 4 KiB

`device` and `step` are 0 where not named. `action` is one of the schedule's (F0, B3, W2.1), or
`optimizer`, or `save`, where the process is about to do so. Without it the first action of the step
is meant, for disk-full the save.
"""  # noqa: E501

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from common.io.usage import UsageError
from common.schedule.action import ScheduleError, parse_action

Kind = Literal["exception", "kill", "hang", "oom", "disk-full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PHASES = ("optimizer", "save")

MAX_TEXT = 100
OOM_HEADROOM_BYTES = 64 * 2**20
FULL_DISK_BYTES = 4096


class FaultError(UsageError):
    """A fault that cannot be read; its text is one line."""


class InjectedFault(RuntimeError):
    """The exception of the fault `exception`."""


@dataclass(frozen=True)
class Fault:
    """A fault, and where it happens."""

    kind: Kind
    device: int = 0
    step: int = 0
    action: str | None = None
    """An action's text, "optimizer" or "save"; None: the first action of the step."""

    def __str__(self) -> str:
        return f"{self.kind}@device={self.device},step={self.step}" + (
            f",action={self.action}" if self.action else ""
        )

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read the text form. Raises FaultError."""
        if len(text) > MAX_TEXT or not text.isprintable():
            raise FaultError(
                f"{text[:MAX_TEXT]!r}: no fault; expected such as kill@device=1,step=3,action=BW2"
            )
        # kill@device=1,step=3,action=BW2
        kind, _, place = text.partition("@")
        if kind not in KINDS:
            raise FaultError(
                f"{text!r}: unknown fault; expected one of {', '.join(KINDS)}, as in kill@step=3"
            )
        numbers, action = {"device": 0, "step": 0}, None
        for word in filter(None, place.split(",")):
            key, _, value = word.partition("=")
            if key in numbers and value.isascii() and value.isdecimal() and len(value) <= 9:
                numbers[key] = int(value)
            elif key == "action":
                action = _action(text, value)
            else:
                raise FaultError(f"{text!r}: {word}; expected device=N, step=N or action=F0")
        return cls(
            kind,
            numbers["device"],
            numbers["step"],
            action or ("save" if kind == "disk-full" else None),
        )

    def strike(self) -> None:
        """Let the fault happen, to this process or thread."""
        match self.kind:
            case "exception":
                raise InjectedFault(str(self))
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                while True:
                    time.sleep(3600)
            case "oom":
                exhaust_memory()
            case "disk-full":
                # From now on a write beyond 4 KiB fails (EFBIG), as a full disk would (ENOSPC).
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))


def _action(text: str, value: str) -> str:
    if value in PHASES:
        return value
    try:
        return str(parse_action(value))
    except ScheduleError as error:
        raise FaultError(f"{text!r}: {error}, or one of {', '.join(PHASES)}") from None


def exhaust_memory() -> NoReturn:
    """Allocate until MemoryError. The limit stays: other threads meet it too."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + OOM_HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    taken = []
    try:
        while True:
            taken.append(bytearray(2**20))
    finally:
        taken.clear()  # the traceback would keep it
