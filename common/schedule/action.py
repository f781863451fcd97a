"""A schedule as data: for every device a list of actions, with a text form that reads back.

    >>> parse_schedule("F0 F1 BW0 BW1\\nF0 BW0 F1 BW1", name="mine").num_micro_batches
    2

An action is an operation, a micro-batch and, with several chunks per device, a chunk:

    F3      forward of micro-batch 3 (chunk 0)
    BW0.1   whole backward of micro-batch 0 in chunk 1

Operations are those of the Zero Bubble paper (Qi et al. 2024); torch.distributed.pipelining calls
them F, I, W and B:

    F    the forward
    B    the backward for the input gradient, which the stage before waits for
    W    the backward for the weight gradients, which nobody waits for
    BW   both as one operation
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

Placement = Literal["loop", "vee"]


class Op(enum.Enum):
    """One kind of work that a stage does for one micro-batch (see the top of this file)."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"

    def __repr__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Action:
    """`op` for `micro_batch` in the device's model chunk `chunk`; both count from 0."""

    op: Op
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.op.value}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


def virtual_stage(device: int, chunk: int, num_devices: int, placement: Placement) -> int:
    """Return which consecutive part of the model `chunk` of `device` is, from 0.

    For 3 devices with 2 chunks each, the parts of the model in order:

        loop   device 0: 0, 3   device 1: 1, 4   device 2: 2, 5    (Narayanan et al. 2021)
        vee    device 0: 0, 5   device 1: 1, 4   device 2: 2, 3    (Qi et al. 2024, section 6)

    In a vee the first and the last part share device 0, and no message is needed where it turns.
    """
    # Odd chunks of a vee count the devices from the last one.
    backwards = placement == "vee" and chunk % 2 == 1
    return chunk * num_devices + (num_devices - 1 - device if backwards else device)


@dataclass(frozen=True)
class Schedule:
    """What each device does, in order: `devices[d]` is the list of actions of device d."""

    name: str
    devices: tuple[tuple[Action, ...], ...]
    num_micro_batches: int
    num_chunks: int = 1
    placement: Placement = "loop"
    first_micro_batch: int = field(default=0, compare=False)
    """The first micro-batch's number in the text form, for messages; actions count from 0."""

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_virtual_stages(self) -> int:
        return self.num_devices * self.num_chunks

    @property
    def num_actions(self) -> int:
        return sum(len(actions) for actions in self.devices)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether B and W are separate actions."""
        return any(action.op is Op.W for actions in self.devices for action in actions)

    @cached_property
    def location(self) -> tuple[tuple[int, int], ...]:
        """(device, chunk) of every virtual stage, in the order of the model: `virtual_stage`
        inverted."""
        where = {
            virtual_stage(device, chunk, self.num_devices, self.placement): (device, chunk)
            for device in range(self.num_devices)
            for chunk in range(self.num_chunks)
        }
        return tuple(where[k] for k in range(self.num_virtual_stages))

    def virtual_stage(self, device: int, chunk: int) -> int:
        return virtual_stage(device, chunk, self.num_devices, self.placement)

    def only_forward(self) -> Schedule:
        """Return the schedule of its forwards alone, in the same order: an evaluation pass."""
        rows = tuple(tuple(action for action in row if action.op is Op.F) for row in self.devices)
        return replace(self, devices=rows)

    def __str__(self) -> str:
        return format_schedule(self)


class ScheduleError(ValueError):
    """A schedule that cannot be made, read or run."""


MAX_PLACES = 2**20
"""The largest devices x micro-batches x chunks of a schedule; each has two or three actions."""

# Digits are bounded: a file may come from anywhere, and its numbers must fit an int64 array.
_HEADER = re.compile(r"#\s*schedule:\s*(?P<name>\S+)(?P<rest>.*)")
_ACTION = re.compile(r"(?P<op>BW|F|B|W)(?P<micro_batch>[0-9]{1,9})(?:\.(?P<chunk>[0-9]{1,4}))?")


def format_schedule(schedule: Schedule) -> str:
    """Return the text form: a header line, then one line of actions per device."""
    header = f"# schedule: {schedule.name} micro_batches={schedule.num_micro_batches}"
    if schedule.num_chunks > 1:
        # Left out with one chunk per device: the placement means nothing there.
        header += f" chunks={schedule.num_chunks} placement={schedule.placement}"
    rows = (f"{d}: {' '.join(map(str, actions))}" for d, actions in enumerate(schedule.devices))
    return "\n".join([header, *rows]) + "\n"


def parse_action(text: str) -> Action:
    """Read `F3`, `BW0` or `W2.1`. Raises ScheduleError."""
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"{text!r} is not an action; expected F, B, W or BW and a micro-batch: F0, BW12, W3.1"
        )
    return Action(Op(match["op"]), int(match["micro_batch"]), int(match["chunk"] or 0))


def parse_schedule(text: str, name: str = "file") -> Schedule:
    """Read the text form: one line per device, `0: F0 F1 ...` (the number is optional).

    `#` starts a comment. The header line is optional: without it micro-batches and chunks are
    counted, and the placement is "loop". Micro-batches may count from 0 or from 1. In a table
    without any W, B means the whole backward and is read as BW.

    Raises ScheduleError with the line number for text that is no schedule. Whether the schedule can
    run is for `validate` to say.
    """
    options: dict[str, str] = {}
    rows: list[list[Action]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line.strip()):
            name = header["name"]
            options = dict(word.split("=", 1) for word in header["rest"].split() if "=" in word)
            continue
        # An empty line is no device: one without actions still has its number, `2:`.
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        # A device number must be the line's own: rows in another order would be another schedule.
        label, colon, actions = content.partition(":")
        if colon and label.strip() != str(len(rows)):
            raise ScheduleError(
                f"line {number}: device {label.strip()!r}; expected {len(rows)}, in order"
            )
        try:
            rows.append([parse_action(word) for word in (actions if colon else content).split()])
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return build_schedule(rows, name, options)


def build_schedule(
    rows: list[list[Action]], name: str, options: dict[str, str] | None = None
) -> Schedule:
    """Make a schedule from parsed rows.

    Whatever `options` (micro_batches, chunks, placement) leaves out is counted. Raises
    ScheduleError.
    """
    options = options or {}
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError(
            "no action in it; expected one line per device, such as: 0: F0 F1 BW0 BW1"
        )
    try:
        num_chunks = int(options.get("chunks", 1 + max(action.chunk for action in actions)))
        stated = int(options["micro_batches"]) if "micro_batches" in options else None
    except ValueError:
        raise ScheduleError(
            f"header: {options}; micro_batches and chunks are whole numbers"
        ) from None
    placement = options.get("placement", "loop")
    if placement not in ("loop", "vee"):
        raise ScheduleError(f"header: placement={placement}; expected loop or vee")
    first, last = min(a.micro_batch for a in actions), max(a.micro_batch for a in actions)
    # Counted from 1 only if no micro-batch 0 occurs and the header's number, if any, agrees.
    base = 1 if first == 1 and (stated is None or last == stated) else 0
    # Without any W, B is what papers before Zero Bubble call the backward: the whole of it.
    merged = not any(action.op is Op.W for action in actions)
    devices = tuple(
        tuple(
            Action(Op.BW if merged and a.op is Op.B else a.op, a.micro_batch - base, a.chunk)
            for a in row
        )
        for row in rows
    )
    num_micro_batches = last + 1 - base if stated is None else stated
    # Before any array is made: a header may announce whatever it likes.
    if (
        min(num_micro_batches, num_chunks) < 1
        or len(rows) * num_micro_batches * num_chunks > MAX_PLACES
    ):
        raise ScheduleError(
            f"{len(rows)} devices, {num_micro_batches} micro-batches, {num_chunks} chunks; "
            "expected at least 1 of "
            f"each, and a product of at most {MAX_PLACES}"
        )
    return Schedule(
        name, devices, num_micro_batches, num_chunks, "vee" if placement == "vee" else "loop", base
    )
