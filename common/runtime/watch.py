"""What every device is doing right now, so that a parent can say who waits for whom in a hang.

    worker                              shared file `watch`        parent
    [1] Watch notes the next action ──► one line per device,  ──►  [2] Board.changed: progress?
        (about 1 microsecond)           mapped into memory         [3] explain: who waits for whom

The device's own thread or process overwrites its line ahead of each action. Only the parent reads
it, a few times a second. [3] compares each device's action with the schedule: a device waits if its
input's sender has not got as far as sending; one whose input is there hangs in the action itself.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from common.runtime.executor import Message
from common.runtime.faults import Fault
from common.schedule.action import Action, Op, Schedule, ScheduleError
from common.schedule.dependencies import MESSAGE_OFFSET
from common.spec.mesh import Mesh
from common.spec.partition import schedule_of
from common.spec.run import RunConfig

Phase = Literal["start", "schedule", "optimizer", "save", "end"]
PHASES: tuple[Phase, ...] = get_args(Phase)
OPS = tuple(Op)

FILE = "watch"
# Changes so far, phase, step, operation (-1: none), micro-batch, chunk.
_LINE = struct.Struct("<6q")


class Watch:
    """The worker side: notes what this process' devices do, and injects the job's fault. [1]"""

    def __init__(self, folder: Path, devices: Sequence[int], fault: Fault | None = None) -> None:
        self._devices, self._fault = devices, fault
        # Mapped into memory, so that a note is a store and costs no system call.
        self._step, self._phase, self._changes = 0, PHASES.index("start"), dict.fromkeys(devices, 0)
        try:
            with (folder / FILE).open("r+b") as file:
                self._memory: mmap.mmap | None = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError):  # a worker that nobody watches
            self._memory = None

    def enter(self, phase: Phase, step: int) -> None:
        """Note that all devices of this process enter `phase`."""
        self._step, self._phase = step, PHASES.index(phase)
        for device in self._devices:
            self._note(device, None)
        if self._fault is not None and (self._fault.action, self._fault.step) == (phase, step):
            self._strike_if_here()

    def on_action(self, device: int, action: Action | None) -> None:
        """Note, in its thread, that `device` is about to do `action`, or (None) has ended."""
        self._note(device, action)
        fault = self._fault
        if (
            fault is not None
            and action is not None
            and PHASES[self._phase] == "schedule"
            and (fault.device, fault.step) == (device, self._step)
            and fault.action in (None, str(action))
        ):
            self._fault = None  # once: where a GPU lags behind, an action is noted again
            fault.strike()

    def _strike_if_here(self) -> None:
        if self._fault is not None and self._fault.device in self._devices:
            self._fault.strike()

    def _note(self, device: int, action: Action | None) -> None:
        if self._memory is None:
            return
        # The counter makes two equal notes in a row differ, so that the parent sees progress.
        self._changes[device] += 1
        op, i, chunk = -1, 0, 0
        if action is not None:
            op, i, chunk = OPS.index(action.op), action.micro_batch, action.chunk
        # No lock: a line that is read half-written is shown, or compared again a moment later.
        line = (self._changes[device], self._phase, self._step, op, i, chunk)
        _LINE.pack_into(self._memory, device * _LINE.size, *line)


@dataclass(frozen=True)
class Place:
    """What one device is doing."""

    phase: Phase
    step: int
    action: Action | None


class Board:
    """The parent side: makes the file, and reads it."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._path, self._config = folder / FILE, config
        # Zeros: a line with no changes counted is a device that has not begun.
        self._seen = bytes(_LINE.size * config.stages)
        self._path.write_bytes(self._seen)  # written, not cut: a full disk shows here

    def changed(self) -> bool:
        """Return whether any device has made progress since the last call. [2]"""
        now = self._path.read_bytes()
        # The counters are part of the lines, so F0 of step 8 differs from F0 of step 7.
        changed, self._seen = now != self._seen, now
        return changed

    def line(self, device: int) -> str:
        """Return a device's line as text, for `who_waits` elsewhere; empty before it began."""
        line = self._path.read_bytes()[device * _LINE.size : (device + 1) * _LINE.size]
        return line.hex() if any(line) else ""

    def places(self) -> list[Place | None]:
        """Return what each device is doing; None for one that has not begun."""
        return _places(self._path.read_bytes())

    def explain(self) -> str:
        """Say in one line who hangs where and who waits for what, causes first. [3]"""
        return _causes_first(explain(self._config, self.places()))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def who_waits(config: RunConfig, lines: Sequence[str]) -> str:
    """Say as `Board.explain` does who hangs and who waits, by every rank's own line (empty for one
    that has not begun). Of several replicas only those where somebody hangs; the others wait.
    """
    mesh, unknown = Mesh.of(config), bytes(_LINE.size)
    found = []
    for line in range(mesh.lines):
        # One line of the mesh is one pipeline, and its stages' lines are what one board would hold.
        own = [bytes.fromhex(lines[rank]) or unknown for rank in mesh.pipeline(line)]
        said = _causes_first(explain(config, _places(b"".join(own))))
        found.append(said if mesh.lines == 1 else f"{mesh.line_name(line)}: {said}")
    return "; ".join([said for said in found if " hangs in " in said] or found)


def _places(lines: bytes) -> list[Place | None]:
    found: list[Place | None] = []
    for changes, phase, step, op, i, chunk in _LINE.iter_unpack(lines):
        action = None if op < 0 else Action(OPS[op], i, chunk)
        found.append(Place(PHASES[phase], step, action) if changes else None)
    return found


def _causes_first(lines: Sequence[str]) -> str:
    return "; ".join(
        sorted(lines, key=lambda line: (" hangs in " not in line, " waits for " in line))
    )


def explain(config: RunConfig, places: Sequence[Place | None]) -> list[str]:
    """Return one line per device: what it does, waits for, or hangs in."""
    try:
        schedule = schedule_of(config)
    except ScheduleError:  # a schedule's file may be gone by now
        schedule = None
    lines = []
    for device, place in enumerate(places):
        if place is None:
            lines.append(f"device {device} has not begun")
        # No action to look up: the device is between two steps, or nobody knows its schedule.
        elif place.action is None or schedule is None or config.executor != "table":
            is_at = {"schedule": "is done with its actions", "start": "is about to begin"}
            is_at["end"] = "is past the last step"
            what = is_at.get(place.phase, f"is in {place.phase}")
            lines.append(f"device {device} {what}, step {place.step}")
        elif (message := _missing_input(schedule, device, place.action, places)) is not None:
            sender = schedule.location[_sender(schedule, device, place.action)][0]
            lines.append(
                f"device {device} waits for the {message} from device {sender}, step {place.step}"
            )
        else:
            lines.append(f"device {device} hangs in {place.action}, step {place.step}")
    return lines


def _sender(schedule: Schedule, device: int, action: Action) -> int:
    """Return the virtual stage that an action's input comes from; out of range at the ends."""
    offset = MESSAGE_OFFSET[action.op]
    # MESSAGE_OFFSET is the sender's, hence the minus: F sends to k + 1, so receives from k - 1.
    return -1 if offset is None else schedule.virtual_stage(device, action.chunk) - offset


def _missing_input(
    schedule: Schedule, device: int, action: Action, places: Sequence[Place | None]
) -> Message | None:
    """Return the message that `action` waits for; None if its sender is past sending it."""
    k = _sender(schedule, device, action)
    if not 0 <= k < schedule.num_virtual_stages:
        return None  # the model's ends take the batch, or the loss: nothing to wait for
    sender, chunk = schedule.location[k]
    forward = action.op is Op.F
    message = Message(
        "activation" if forward else "gradient",
        action.micro_batch,
        schedule.virtual_stage(device, action.chunk),
    )
    place = places[sender]
    if place is None or (place.action is None and place.phase != "schedule"):
        return message  # the sender has not begun this step's list
    if place.action is None:  # has ended its list
        return None
    # Where the sender's list has the action that makes the message: its F, or its B or BW. Say
    # device 0 has F0 F1 BW0 BW1 and stands at F1, and device 1 at F1: place 1 of that list makes
    # the message, and device 0 is not past it. If device 0 stood at BW0, device 1 would have its
    # input, and would be hanging in F1 itself.
    row = [replace(each, overlaps=False) for each in schedule.devices[sender]]
    of_message = {(op, action.micro_batch, chunk) for op in ((Op.F,) if forward else (Op.B, Op.BW))}
    sends = [n for n, a in enumerate(row) if (a.op, a.micro_batch, a.chunk) in of_message]
    # Noted ahead of an action: a sender that stands at the very action has not sent yet.
    has_not_sent = sends and place.action in row and row.index(place.action) <= sends[0]
    return message if has_not_sent else None
