"""A pipeline as a job shop: what the search works on instead of `Schedule`.

In a job shop every job is a chain of operations, each on one machine, and one looks for an order
for every machine. Here a job is a micro-batch, a machine is a device, and from every B hangs a W:

    F(i, 0) ─► F(i, 1) ─► ... ─► F(i, K-1) ─► B(i, K-1) ─► ... ─► B(i, 1) ─► B(i, 0)
                                                 │                   │          │
                                                 ▼                   ▼          ▼
                                              W(i, K-1)           W(i, 1)    W(i, 0)

[1] An action is a number, so that a list can be looked up by it. For m micro-batches and K virtual
    stages, with F, B and W counted 0, 1 and 2:

        action = (operation x K + virtual stage) x m + micro-batch

    `action // m` is its stream: one operation on one virtual stage. A stream keeps the order of the
    micro-batches, so that weight gradients add up to the same bits in every order.

[2] An order is one row of actions per device. Every action waits for the one before it in its row
    and for at most one elsewhere, `before`; so one pass gives all times (`Shop.play`).

[3] What counts is the largest of (end of a device's last action + `Shop.after_last`): 0 for the
    plain makespan. A warm start counts from a device's first forward. That forward comes first
    in every order and waits for nothing but the same on the devices before, so its start is known
    beforehand, and `after_last` is minus that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.schedule.action import Action, Op, Placement, Schedule
from common.schedule.simulate import Costs

Objective = Literal["plain", "warm"]
Rows = list[list[int]]

ROUNDING = 1e-9  # sums of costs and of shares of activations may be off by this much
_OPS = (Op.F, Op.B, Op.W)


@dataclass(frozen=True)
class Times:
    """When every action starts and ends, and the actions in an order in which they can be run."""

    start: list[float]  # (n,)
    end: list[float]  # (n,)
    order: list[int]  # shorter than n where the devices wait for one another


class Shop:
    """The actions of p devices with v chunks each, their costs and their memory limit.

    `memory_limit` is in activations of one micro-batch, one number per device. All times are in the
    unit of the costs, and lists of n entries are indexed by action [1].
    """

    def __init__(
        self,
        p: int,
        m: int,
        v: int,
        placement: Placement,
        costs: Costs,
        memory_limit: Sequence[float],
        objective: Objective = "plain",
    ) -> None:
        self.shape = Schedule("search", ((),) * p, m, v, placement)
        self.p, self.m, self.v, self.stages = p, m, v, p * v
        self.costs, self.objective = costs, objective
        # In chunks: a chunk holds 1/v of a stage's activation.
        self.memory_limit = [min(limit, m) * v + ROUNDING for limit in memory_limit]
        kept = costs.kept_by_backward_input
        self.num_actions = n = 3 * self.stages * m
        self.device = [0] * n
        self.duration = [0.0] * n
        self.holds = [0.0] * n  # what it adds to the device's memory, in chunks
        self.before = [-1] * n  # the action elsewhere that it waits for
        self.delay = [0.0] * n  # of the message from there
        self.next = [-1] * n  # the F or B that waits for it
        self.weight = [-1] * n  # of a B: its W
        place = self.shape.location
        for stream in range(3 * self.stages):
            # All of a stream's m actions are alike, so slices fill them at once.
            code, k = divmod(stream, self.stages)
            here = slice(stream * m, (stream + 1) * m)
            self.device[here] = [place[k][0]] * m
            self.duration[here] = [self._cost(costs.of(_OPS[code]), k, v)] * m
            self.holds[here] = [(1.0, kept - 1.0, -kept)[code]] * m
            sender = self._sender(code, k)
            if sender is None:
                continue
            there = slice(sender * m, (sender + 1) * m)
            self.before[here] = range(there.start, there.stop)
            (self.weight if code == 2 else self.next)[there] = range(here.start, here.stop)
            if place[sender % self.stages][0] != place[k][0]:
                self.delay[here] = [self._cost(costs.message, sender % self.stages)] * m
        # The first forward of every device, one after the other. [3]
        first = [0.0] * p
        for k in range(1, p):
            first[k] = first[k - 1] + self.duration[(k - 1) * m] + self.delay[k * m]
        self.after_last = [0.0] * p if objective == "plain" else [-start for start in first]
        # By device: the value if only it counted and it were never idle after its first F.
        self.never_idle = [a + b for a, b in zip(first, self.after_last, strict=True)]
        for d, duration in zip(self.device, self.duration, strict=True):
            self.never_idle[d] += duration

    def _cost(self, values: Sequence[float], k: int, chunks: int = 1) -> float:
        """Return the cost of virtual stage k: its own, or the share of its device's."""
        # Costs may be of virtual stages, or of whole stages, of which a chunk takes its share.
        own = len(values) == self.stages > self.p
        return values[k] if own else values[self.shape.location[k][0]] / chunks

    def _sender(self, code: int, k: int) -> int | None:
        """Return the stream that stream (code, k) waits for: the arrows of the drawing above."""
        stream = code * self.stages + k
        if code == 0:
            return stream - 1 if k else None
        if code == 1 and k < self.stages - 1:
            return stream + 1
        return stream - self.stages  # a W waits for its B, and the last B for its F

    def fits(self, rows: Rows) -> bool:
        """Return whether no device ever holds more than its limit."""
        return all(
            max(itertools.accumulate(self.holds[a] for a in row)) <= limit
            for row, limit in zip(rows, self.memory_limit, strict=True)
        )

    def play(self, rows: Rows) -> Times:
        """Return all times, as `common.schedule.play` does: by lists, for many thousand orders."""
        before, delay, duration = self.before, self.delay, self.duration
        start, end = [0.0] * self.num_actions, [-1.0] * self.num_actions
        order: list[int] = []
        reached, clock = [0] * self.p, [0.0] * self.p
        waiting: dict[int, int] = {}  # action: device
        runnable = list(range(self.p))
        while runnable:
            d = runnable.pop()
            row, at, now = rows[d], reached[d], clock[d]
            while at < len(row):
                a = row[at]
                if (sender := before[a]) >= 0:
                    if (sent := end[sender]) < 0:
                        waiting[sender] = d
                        break
                    if sent + delay[a] > now:
                        now = sent + delay[a]
                start[a] = now
                end[a] = now = now + duration[a]
                order.append(a)
                if a in waiting:
                    runnable.append(waiting.pop(a))
                at += 1
            reached[d], clock[d] = at, now
        return Times(start, end, order)

    def value(self, rows: Rows, times: Times) -> float:
        """Return what is to be made small. [3]"""
        return max(
            times.end[row[-1]] + after for row, after in zip(rows, self.after_last, strict=True)
        )

    def time_left(self, following: Sequence[int], order: Sequence[int]) -> list[float]:
        """Return (n,): the longest way from each action's start to the end of all, in time.

        `following` (n,) is what comes next in the row, -1 for nothing; `order` is `Times.order`.
        """
        left = [0.0] * self.num_actions
        for a in reversed(order):
            then = left[following[a]] if following[a] >= 0 else self.after_last[self.device[a]]
            if (b := self.next[a]) >= 0 and left[b] + self.delay[b] > then:
                then = left[b] + self.delay[b]
            if (b := self.weight[a]) >= 0 and left[b] > then:
                then = left[b]
            left[a] = then + self.duration[a]
        return left

    def rows(self, schedule: Schedule) -> Rows:
        """Return a schedule of this shape as rows; a BW becomes a B and a W."""

        def numbers(op: Op, i: int, k: int) -> list[int]:
            parts = (Op.B, Op.W) if op is Op.BW else (op,)
            return [(_OPS.index(part) * self.stages + k) * self.m + i for part in parts]

        return [
            [
                number
                for action in row
                for number in numbers(
                    action.op, action.micro_batch, schedule.virtual_stage(d, action.chunk)
                )
            ]
            for d, row in enumerate(schedule.devices)
        ]

    def schedule(self, rows: Rows) -> Schedule:
        """Return rows as a schedule: `rows` inverted."""
        place = self.shape.location
        devices = []
        for row in rows:
            split = (divmod(a, self.m) for a in row)
            devices.append(
                tuple(
                    Action(_OPS[stream // self.stages], i, place[stream % self.stages][1])
                    for stream, i in split
                )
            )
        shape = self.shape
        return Schedule(shape.name, tuple(devices), self.m, self.v, shape.placement)
