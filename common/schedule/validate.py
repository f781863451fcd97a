"""Say everything that is wrong with a schedule: each violation by its rule's name and its place.

    [1] check_actions   every action exactly once, and none that the schedule does not have
    [2] check_order     what an action needs is there, and earlier if on the same device
    [3] check_deadlock  no devices wait for one another in a circle (the schedule is played)

Together they are enough: what passes runs to its end, in any framework.

>>> from common.schedule.action import parse_schedule
>>> for violation in validate(parse_schedule("F0 BW0\\nBW0 F0")):
...     print(violation)
[backward-before-forward] device 1, action 0 (BW0): needs F0 of the same device, which comes later, at action 1
"""  # noqa: E501

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from common.schedule.action import Action, Op, Schedule, ScheduleError
from common.schedule.play import play
from common.schedule.table import OP_CODE, IntArray, Table, tabulate


class Rule(enum.StrEnum):
    """The rules that a schedule must keep. The names are stable: messages and tests use them."""

    UNKNOWN_ACTION = "unknown-action"
    """A micro-batch or chunk that the schedule does not have."""
    MISSING_ACTION = "missing-action"
    """Every micro-batch needs F, and B and W or BW, on every virtual stage."""
    REPEATED_ACTION = "repeated-action"
    """... exactly once; BW counts as B and as W."""
    ACTION_COUNT = "action-count"
    """A device runs m x v forwards, backwards for the input and backwards for the weights."""
    FORWARD_BEFORE_INPUT = "forward-before-input"
    """F on virtual stage k comes after F on k - 1."""
    BACKWARD_BEFORE_FORWARD = "backward-before-forward"
    """B comes after its own F."""
    BACKWARD_BEFORE_NEXT_STAGE = "backward-before-next-stage"
    """B on virtual stage k comes after B on k + 1."""
    WEIGHT_BEFORE_BACKWARD = "weight-before-backward"
    """W comes after its own B."""
    RECEIVE_WITHOUT_SEND = "receive-without-send"
    """No action waits for a message that no device ever sends."""
    DEADLOCK = "deadlock"
    """No devices wait for one another in a circle."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule. `position`: the action's place in the device's list, from 0; or None."""

    rule: Rule
    device: int
    position: int | None
    action: str
    message: str

    def __str__(self) -> str:
        place = f"device {self.device}"
        if self.position is not None:
            place += f", action {self.position} ({self.action})"
        return f"[{self.rule}] {place}: {self.message}"


# By (needed operation, offset) as in `NEEDS`: each need has a rule, and so a name, of its own.
_RULE_OF_NEED = {
    (Op.F, -1): Rule.FORWARD_BEFORE_INPUT,
    (Op.F, 0): Rule.BACKWARD_BEFORE_FORWARD,
    (Op.B, +1): Rule.BACKWARD_BEFORE_NEXT_STAGE,
    (Op.B, 0): Rule.WEIGHT_BEFORE_BACKWARD,
}
MAX_MISSING_LISTED = 1000
"""So many missing actions get a violation each; one more counts the rest."""
# A result, and the two operations that count as it.
_PART_OF = {Op.F: (Op.F, Op.BW), Op.B: (Op.B, Op.BW), Op.W: (Op.W, Op.BW)}


def validate(schedule: Schedule) -> list[Violation]:
    """Return all violations, by device and position; without any, the schedule runs to its end."""
    report = _Report(tabulate(schedule))
    report.check_actions()
    report.check_order()
    report.check_deadlock()
    return report.sorted()


def require_valid(schedule: Schedule) -> None:
    """Raise ScheduleError with all violations (50 at most in its text), if there are any."""
    violations = validate(schedule)
    if violations:
        lines = "\n".join(f"  {violation}" for violation in violations[:50])
        more = f"\n  and {len(violations) - 50} more" if len(violations) > 50 else ""
        raise ScheduleError(
            f"schedule {schedule.name} breaks {len(violations)} rules:\n{lines}{more}"
        )


class _Report:
    """Collects violations.

    Arrays find the few rows that break a rule; only those are looked at one by one. A valid
    schedule of a million actions takes seconds that way.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.schedule = table.schedule
        self.violations: list[Violation] = []

    def sorted(self) -> list[Violation]:
        # Counts and missing actions (no position) first within their device.
        return sorted(
            self.violations, key=lambda v: (v.device, -1 if v.position is None else v.position)
        )

    def check_actions(self) -> None:
        """Check that every action is there exactly once, and none is unknown. [1]"""
        table, schedule = self.table, self.schedule
        for row in np.flatnonzero(~table.in_range).tolist():
            right = f"micro-batches {self.label(0)} to {self.label(schedule.num_micro_batches - 1)}"
            chunks = f"chunks 0 to {table.chunk_counts[table.device[row]] - 1}"
            self.add(Rule.UNKNOWN_ACTION, row, f"the schedule has {right} and {chunks}")
        # Two rows that fill one slot repeat an action; a slot that no row fills misses one.
        slots, rows = table.results
        for slot, row in sorted(zip(*_repeats(slots, rows), strict=True), key=lambda pair: pair[1]):
            op, _, _ = table.describe_slot(slot)
            first = int(table.producer[slot])
            done = (
                f"{self.name(first)} at action {table.position(first)} has done this "
                f"{op.value} already"
            )
            self.add(Rule.REPEATED_ACTION, row, done)
        missing = np.flatnonzero(table.producer < 0)  # slots
        for slot in missing[:MAX_MISSING_LISTED].tolist():
            self.add_missing(*table.describe_slot(slot))
        if len(missing) > MAX_MISSING_LISTED:  # a file can announce a million with a few bytes
            self.add_missing(
                *table.describe_slot(int(missing[MAX_MISSING_LISTED])),
                len(missing) - MAX_MISSING_LISTED,
            )
        self.check_counts()  # sums the lists above up, in a line per device

    def check_counts(self) -> None:
        """Check every device's totals: F, B (with BW) and W (with BW) each m x v times."""
        table, each = self.table, self.schedule.num_micro_batches * self.table.chunk_counts  # (p,)
        count = np.zeros((self.schedule.num_devices, len(OP_CODE)), np.int64)
        np.add.at(count, (table.device, table.op), 1)
        for result, (op, merged) in _PART_OF.items():
            found = count[:, OP_CODE[op]] + (0 if op is Op.F else count[:, OP_CODE[merged]])
            for device in np.flatnonzero(found != each).tolist():
                has = f"{found[device]} {result.value}" + ("" if op is Op.F else " (BW included)")
                message = f"{has}; expected {each[device]}, one per micro-batch and chunk"
                self.violations.append(Violation(Rule.ACTION_COUNT, device, None, "", message))

    def check_order(self) -> None:
        """Check that what is needed is there, and earlier in the list if on the same device. [2]"""
        table = self.table
        for _, result, offset, rows, slots in table.needs:
            self.check_present(result, offset, rows, slots)
            producer = table.producer[slots]
            # Rows are in list order, so a larger row on the same device comes later in its list.
            late = (producer > rows) & (table.device[producer] == table.device[rows])
            together = table.overlaps[rows] & (producer == rows - 1)
            for row in rows[together].tolist():
                message = f"needs {self.name(row - 1)}, with which it overlaps"
                self.add(_RULE_OF_NEED[result, offset], row, message)
            for row, needed in zip(rows[late].tolist(), producer[late].tolist(), strict=True):
                comes = f"which comes later, at action {table.position(needed)}"
                self.add(
                    _RULE_OF_NEED[result, offset],
                    row,
                    f"needs {self.name(needed)} of the same device, {comes}",
                )

    def check_present(self, result: Op, offset: int, rows: IntArray, slots: IntArray) -> None:
        """Check that some row fills each needed slot: else nobody sends, or nothing is held."""
        table = self.table
        absent = table.producer[slots] < 0
        for row, slot in zip(rows[absent].tolist(), slots[absent].tolist(), strict=True):
            op, micro_batch, k = table.describe_slot(slot)
            device, chunk = self.schedule.location[k]
            needed = self.name_of(Action(op, micro_batch, chunk))
            # On its own device nothing is sent: what is missing would have been held there.
            if device == table.device[row]:
                self.add(
                    _RULE_OF_NEED[result, offset],
                    row,
                    f"needs {needed} of the same device, which is missing",
                )
            else:
                message = f"waits for the message of {needed} of device {device}, which never runs"
                self.add(Rule.RECEIVE_WITHOUT_SEND, row, message)

    def check_deadlock(self) -> None:
        """Play the schedule; a device that does not end is stuck. Show each circle once. [3]"""
        table = self.table
        zeros = [0.0] * table.num_rows  # only who arrives matters, not when
        reached = play(table, zeros, zeros).reached
        stuck = {d: row for d, row in enumerate(reached) if row < table.bounds[d + 1]}
        waits_for = {d: int(table.device[table.source[row]]) for d, row in stuck.items()}
        # Every stuck device waits for one other that is stuck too, so following the arrows ends in
        # a circle; devices on the way into it are stuck because of it, and are not shown.
        seen: set[int] = set()
        for device in stuck:
            path: list[int] = []
            while device not in seen:
                seen.add(device)
                path.append(device)
                device = waits_for[device]
            if device in path:
                self.add_cycle([stuck[d] for d in path[path.index(device) :]])

    def label(self, micro_batch: int) -> int:
        return micro_batch + self.schedule.first_micro_batch

    def name_of(self, action: Action) -> str:
        """Return the action as the schedule's own text writes it."""
        return str(Action(action.op, self.label(action.micro_batch), action.chunk))

    def name(self, row: int) -> str:
        return self.name_of(self.table.action(row))

    def add(self, rule: Rule, row: int, message: str) -> None:
        device, position = int(self.table.device[row]), self.table.position(row)
        self.violations.append(Violation(rule, device, position, self.name(row), message))

    def add_missing(self, op: Op, micro_batch: int, k: int, and_so_on: int = 1) -> None:
        device, chunk = self.schedule.location[k]
        name = self.name_of(Action(op, micro_batch, chunk))
        either = "" if op is Op.F else f" (or {self.name_of(Action(Op.BW, micro_batch, chunk))})"
        are = "is missing" if and_so_on == 1 else f"and {and_so_on - 1} more are missing"
        self.violations.append(
            Violation(Rule.MISSING_ACTION, device, None, name, f"{name}{either} {are}")
        )

    def add_cycle(self, rows: list[int]) -> None:
        table = self.table
        steps = []
        for row in rows:
            sender = int(table.source[row])
            waits = f"device {table.device[row]} at action {table.position(row)} ({self.name(row)})"
            steps.append(f"{waits} waits for {self.name(sender)} of device {table.device[sender]}")
        self.add(Rule.DEADLOCK, rows[0], f"a circle of {len(rows)}: {'; '.join(steps)}")


def _repeats(slots: IntArray, rows: IntArray) -> tuple[list[int], list[int]]:
    """Return the (slots, rows) that fill a slot which an earlier row has filled."""
    order = np.lexsort((rows, slots))  # by slot, then by row: repeats are neighbours
    slots, rows = slots[order], rows[order]
    again = np.flatnonzero(slots[1:] == slots[:-1]) + 1  # places in `slots`
    return slots[again].tolist(), rows[again].tolist()
