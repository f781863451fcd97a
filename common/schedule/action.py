"""A schedule as data: for every device a list of actions, with a text form that reads back.

    >>> parse_schedule("F0 F1 BW0 BW1\\nF0 BW0 F1 BW1", name="mine").num_micro_batches
    2

An action is an operation, a micro-batch and, with several chunks per device, a chunk:

    F3      forward of micro-batch 3 (chunk 0)
    BW0.1   whole backward of micro-batch 0 in chunk 1

Operations are the Zero Bubble paper's (Qi et al. 2024); torch.distributed.pipelining's F, I, W, B:

    F    the forward
    B    the backward for the input gradient, which the stage before waits for
    W    the backward for the weight gradients, which nobody waits for
    BW   both as one operation

A forward and a backward that run at the same time are one word, `(F7&BW3.1)`.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from common.io.edges import printable
from common.io.usage import UsageError

Placement = Literal["loop", "vee"] | tuple[tuple[int, ...], ...]
"""A name (`named_placement`), or for every device the virtual stages of its chunks."""


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
    overlaps: bool = False
    """Whether it runs together with the action before it in the list: a BW after an F."""

    def __str__(self) -> str:
        return f"{self.op.value}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


def named_placement(
    name: Literal["loop", "vee"], num_devices: int, num_chunks: int
) -> tuple[tuple[int, ...], ...]:
    """Return, for every device, which consecutive parts of the model its chunks are, from 0.

    For 3 devices with 2 chunks each, the parts of the model in order:

        loop   device 0: 0, 3   device 1: 1, 4   device 2: 2, 5    (Narayanan et al. 2021)
        vee    device 0: 0, 5   device 1: 1, 4   device 2: 2, 3    (Qi et al. 2024, section 6)

    In a vee the first and the last part share device 0, and no message is needed where it turns.
    """
    # Odd chunks of a vee count the devices from the last one.
    return tuple(
        tuple(
            chunk * num_devices
            + (num_devices - 1 - device if name == "vee" and chunk % 2 else device)
            for chunk in range(num_chunks)
        )
        for device in range(num_devices)
    )


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

    def __hash__(self) -> int:
        # Its actions too would be thousands, each time that a cache is asked for a schedule.
        return hash((self.name, len(self.devices), self.num_micro_batches, self.num_chunks))

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_virtual_stages(self) -> int:
        return sum(map(len, self.parts))

    @property
    def num_actions(self) -> int:
        return sum(len(actions) for actions in self.devices)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether B and W are separate actions."""
        return any(action.op is Op.W for actions in self.devices for action in actions)

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The virtual stages of every device's chunks: `parts[d][c]` is chunk c of device d."""
        if isinstance(self.placement, str):
            return named_placement(self.placement, self.num_devices, self.num_chunks)
        return self.placement

    @cached_property
    def location(self) -> tuple[tuple[int, int], ...]:
        """(device, chunk) of every virtual stage, in the order of the model: `parts` inverted."""
        # A vee of 2 devices: parts ((0, 3), (1, 2)), so virtual stages 0 to 3 lie at (0, 0), (1,
        # 0), (1, 1) and (0, 1).
        where = {k: (d, c) for d, row in enumerate(self.parts) for c, k in enumerate(row)}
        return tuple(where[k] for k in range(len(where)))

    @property
    def grid(self) -> tuple[int, int]:
        """(devices, chunks on each); (virtual stages, 1) where devices have unlike numbers."""
        stages = self.num_virtual_stages
        size = self.num_devices, self.num_chunks
        return size if stages == self.num_devices * self.num_chunks else (stages, 1)

    def virtual_stage(self, device: int, chunk: int) -> int:
        return self.parts[device][chunk]

    def only_forward(self) -> Schedule:
        """Return the schedule of its forwards alone, in the same order: an evaluation pass."""
        rows = tuple(tuple(action for action in row if action.op is Op.F) for row in self.devices)
        return replace(self, devices=rows)

    def __str__(self) -> str:
        return format_schedule(self)


class ScheduleError(UsageError):
    """A schedule that cannot be made, read or run."""


MAX_PLACES = 2**20
"""The largest devices x micro-batches x chunks of a schedule; each has two or three actions."""

# Digits are bounded: a file may come from anywhere, and its numbers must fit an int64 array.
_HEADER = re.compile(r"#\s*schedule:\s*(?P<name>\S+)(?P<rest>.*)")
_ACTION = re.compile(r"(?P<op>BW|F|B|W)(?P<micro_batch>[0-9]{1,9})(?:\.(?P<chunk>[0-9]{1,4}))?")


def format_schedule(schedule: Schedule) -> str:
    """Return the text form: a header line, then one line of actions per device."""
    lines = [f"# schedule: {schedule.name} micro_batches={schedule.num_micro_batches}"]
    if not isinstance(schedule.placement, str):
        devices = (" ".join(map(str, row)) for row in schedule.placement)
        lines.append(f"placement: {' | '.join(devices)}")
    elif schedule.num_chunks > 1:
        # Left out with one chunk per device: the placement means nothing there.
        lines[0] += f" chunks={schedule.num_chunks} placement={schedule.placement}"
    rows = (f"{d}: {' '.join(words(actions))}" for d, actions in enumerate(schedule.devices))
    return "\n".join([*lines, *rows]) + "\n"


def words(actions: Iterable[Action]) -> list[str]:
    """Return the actions as the text form has them: two that overlap are one word."""
    found: list[str] = []
    for action in actions:
        # The first of the pair is in the list already: it is taken back and joined.
        found.append(f"({found.pop()}&{action})" if action.overlaps else str(action))
    return found


def parse_action(text: str) -> Action:
    """Read `F3`, `BW0` or `W2.1`. Raises ScheduleError."""
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"{text!r} is not an action; expected F, B, W or BW and a micro-batch: F0, BW12, W3.1, "
            "or two that overlap: (F1&BW0)"
        )
    return Action(Op(match["op"]), int(match["micro_batch"]), int(match["chunk"] or 0))


def parse_word(text: str) -> tuple[Action, ...]:
    """Read an action, or two that overlap: `(F7&BW3.1)`. Raises ScheduleError."""
    if not (text.startswith("(") and text.endswith(")") and text.count("&") == 1):
        return (parse_action(text),)
    first, second = map(parse_action, text[1:-1].split("&"))
    if first.op is not Op.F or second.op not in (Op.B, Op.BW):
        raise ScheduleError(f"{text}; expected a forward and a whole backward, as in (F1&BW0)")
    return first, replace(second, overlaps=True)


def parse_schedule(text: str, name: str = "file") -> Schedule:
    """Read the text form: one line per device, `0: F0 F1 ...` (the number is optional).

    `#` starts a comment. The header line is optional: without it micro-batches and chunks are
    counted, and the placement is "loop". A line `placement: 0 1 4 | 2 3 5` says for every device
    which virtual stages its chunks are. Micro-batches may count from 0 or from 1. In a table
    without any W, B means the whole backward and is read as BW.

    Raises ScheduleError with the line number for text that is no schedule. Whether the schedule can
    run is for `validate` to say.
    """
    options: dict[str, str] = {}
    rows: list[list[Action]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        # `# schedule: mine micro_batches=4 chunks=2 placement=vee`: every other comment is skipped.
        if header := _HEADER.match(line.strip()):
            name = header["name"]
            options |= dict(word.split("=", 1) for word in header["rest"].split() if "=" in word)
            continue
        # An empty line is no device: one without actions still has its number, `2:`.
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        # A device number must be the line's own: rows in another order would be another schedule.
        label, colon, actions = content.partition(":")
        if label.strip() == "placement":
            if "placement" in options:
                raise ScheduleError(f"line {number}: a second placement; expected one")
            options["placement"] = actions.strip()
            continue
        if colon and label.strip() != str(len(rows)):
            raise ScheduleError(
                f"line {number}: device {label.strip()!r}; expected {len(rows)}, in order"
            )
        try:
            text_of_row = actions if colon else content
            rows.append([a for word in text_of_row.split() for a in parse_word(word)])
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return build_schedule(rows, name, options)


def require_size(devices: int, micro_batches: int, chunks: int) -> None:
    """Raise ScheduleError for sizes that no array should be made for: a file says what it likes."""
    if min(micro_batches, chunks) < 1 or devices * micro_batches * chunks > MAX_PLACES:
        raise ScheduleError(
            f"{devices} devices, {micro_batches} micro-batches, {chunks} chunks; expected at least "
            f"1 of each, and a product of at most {MAX_PLACES}"
        )


def build_schedule(
    rows: list[list[Action]], name: str, options: dict[str, str] | None = None
) -> Schedule:
    """Make a schedule from parsed rows.

    What `options` (micro_batches, chunks, placement) leave out is counted. Raises ScheduleError.
    """
    options = options or {}
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError(
            "no action in it; expected one line per device, such as: 0: F0 F1 BW0 BW1"
        )
    placement = _read_placement(options.get("placement", "loop"))
    counted = (
        1 + max(action.chunk for action in actions)
        if isinstance(placement, str)
        else max(map(len, placement))
    )
    try:
        num_chunks = int(options.get("chunks", counted))
        stated = int(options["micro_batches"]) if "micro_batches" in options else None
    except ValueError:
        raise ScheduleError(
            f"header: {options}; micro_batches and chunks are whole numbers"
        ) from None
    # Papers count micro-batches from 1. Actions 1 to 4 are read as 0 to 3, unless a header says
    # that there are more than 4.
    first, last = min(a.micro_batch for a in actions), max(a.micro_batch for a in actions)
    # Counted from 1 only if no micro-batch 0 occurs and the header's number, if any, agrees.
    base = 1 if first == 1 and (stated is None or last == stated) else 0
    # Without any W, B is what papers before Zero Bubble call the backward: the whole of it.
    merged = not any(action.op is Op.W for action in actions)
    devices = tuple(
        tuple(
            replace(
                a, op=Op.BW if merged and a.op is Op.B else a.op, micro_batch=a.micro_batch - base
            )
            for a in row
        )
        for row in rows
    )
    for action in itertools.chain.from_iterable(devices):
        if action.overlaps and action.op is not Op.BW:
            raise ScheduleError(
                f"{action} runs together with a forward; expected a whole backward, as in (F1&BW0)"
            )
    num_micro_batches = last + 1 - base if stated is None else stated
    require_size(len(rows), num_micro_batches, num_chunks)
    if not isinstance(placement, str):
        if (len(placement), counted) != (len(rows), num_chunks):
            raise ScheduleError(
                f"placement of {len(placement)} devices and {counted} chunks; the schedule has "
                f"{len(rows)} devices and {num_chunks} chunks"
            )
        placement = canonical(placement)
    return Schedule(name, devices, num_micro_batches, num_chunks, placement, base)


def canonical(placement: tuple[tuple[int, ...], ...]) -> Placement:
    """Return the placement by its name where it has one. With one chunk per device that is "loop".

    Raises ScheduleError unless every virtual stage from 0 on occurs once, and each device has one.
    """
    numbers = sorted(itertools.chain.from_iterable(placement))
    if numbers != list(range(len(numbers))) or not all(placement):
        shown = printable(" | ".join(" ".join(map(str, row)) for row in placement), 60)
        raise ScheduleError(
            f"placement {shown}: expected every virtual stage once, counted from 0, and at least "
            "one on each device, as in 0 3 | 1 2"
        )
    for name in ("loop", "vee"):
        if placement == named_placement(name, len(placement), len(placement[0])):
            return name
    return placement


def _read_placement(text: str) -> Placement:
    if text in ("loop", "vee"):
        return "vee" if text == "vee" else "loop"
    try:
        return tuple(tuple(map(int, row.split())) for row in text.split("|"))
    except ValueError:
        raise ScheduleError(
            f"placement {printable(text, 60)}; expected loop, vee or the virtual stages of every "
            "device, as in 0 3 | 1 2"
        ) from None
