"""V-Half and V-Min: a half and a third of 1F1B's memory (Qi et al. 2024, "Pipeline Parallelism with
Controllable Memory").

Two chunks per device in a V. Time is cut into slots, one action each. A micro-batch's F0, F0.1,
B0.1 and B0 lie at fixed offsets on every device, and the next micro-batch follows 6 slots later:
the offsets alone say for how long an activation is held, and so how many are. Ws fill the slots
between. The pattern of v-min for 2 devices and its first micro-batch:

    slot      0    1    2    3    4    5    6    7
    device 0  F0             F0.1 B0.1           B0
    device 1       F0   F0.1           B0.1 B0

    [1] `_schedule`  the pattern, of all micro-batches
    [2] `_fill`      Ws in free slots
    [3] `_moved`     fill and drain have holes: what can start earlier does, as long as no device
                     then holds more than one did before
    [4] `_squeezed`  the slots in which that order can run

[3] and [4] are done with the Ws in place, and again without them, where more can move. That is the
reordering of the authors' program, and gives its orders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from common.schedule.action import Action, Op, Schedule
from common.schedule.simulate import Costs, simulate
from common.schedule.table import OP_CODE

Slots = list[NDArray[np.int64]]
"""Of one device: by micro-batch those of each of the `KINDS`, (m,), and those of the Ws, (2m,)."""
KINDS = ((Op.F, 0), (Op.F, 1), (Op.B, 1), (Op.B, 0))
INTERVAL = 6  # six actions per micro-batch and device


def v_half(p: int, m: int) -> Schedule:
    """Hold at most (p + 2) // 2 activations on any device, about half of 1F1B's p."""
    gap = 3 if p % 2 == 0 else 0  # else actions of two micro-batches would share a slot
    return _schedule(
        "v-half",
        m,
        [(2 * d, 3 * p - d - 2, 3 * p + gap + 2 * d - 1, 6 * p + gap - d - 2) for d in range(p)],
    )


def v_min(p: int, m: int) -> Schedule:
    """Hold at most (p + 4) // 3 activations on any device, about a third of 1F1B's p.

    For F = B = W: where they differ, every micro-batch is late by the difference.
    """
    gap = 2 if p % 3 == 0 else 0
    return _schedule(
        "v-min", m, [(d, 2 * p - d - 1, 2 * p + gap + d, 4 * p + gap - d - 1) for d in range(p)]
    )


def why_not_v_min(schedule: Schedule, costs: Costs) -> str | None:
    """Return what unequal costs make of v-min, in a line; None for equal ones."""
    again = 0 if costs.recompute == "none" else 1  # a B that computes its forward again is longer
    times = zip(costs.forward, costs.backward_input, costs.backward_weight, strict=True)
    third = tuple((f + b + w + again * f) / 3 for f, b, w in times)
    equal = replace(
        costs,
        forward=third,
        backward_input=third,
        backward_weight=third,
        communication=(0.0,) * costs.num_stages,
        transmission=None,
        recompute="none",
    )
    takes, would_take = (simulate(schedule, each, check=False).makespan for each in (costs, equal))
    if takes <= would_take * (1 + 1e-9):
        return None
    half = simulate(v_half(schedule.num_devices, schedule.num_micro_batches), costs, check=False)
    return (
        f"v-min has no slack for unequal costs: makespan {takes:.6g} with these, {would_take:.6g} "
        f"with F = B = W and no communication; v-half takes {half.makespan:.6g} with these"
    )


def _schedule(name: str, m: int, offsets: Sequence[Sequence[int]]) -> Schedule:
    # Every micro-batch is the pattern of the first, 6 slots later for each before it.
    devices = [[first + INTERVAL * np.arange(m) for first in of_device] for of_device in offsets]
    # The second time without the Ws, which are filled in anew behind it.
    for with_weights in (True, False):
        devices = [slots[:4] for slots in _squeezed(_moved(devices, with_weights))]
    return _in_order([[*slots, _fill(slots)] for slots in devices], name)


def _fill(slots: Slots) -> NDArray[np.int64]:
    """Return the slots of the Ws: each the first free one after a B that waits for its W. [2]"""
    size = 1 + max(int(times[-1]) for times in slots)
    forwards, backwards = (
        np.bincount(np.concatenate(times), minlength=size) for times in (slots[:2], slots[2:4])
    )
    # A B adds 1 to those that wait and a free slot takes 1 away, unless there is none. Device 0 at
    # the top of this file:
    #     slot       0   1   2   3   4   5   6   7
    #     total      0  -1  -2  -2  -1  -2  -3  -2    if every free slot took 1 away
    #     waiting    0   0   0   0   1   0   0   1    what total is above its lowest value so far
    #     done       0   0   0   0   0   1   1   1    the W of B0.1 in slot 5, that of B0 in slot 8
    total = np.cumsum(2 * backwards + forwards - 1)
    waiting = total - np.minimum.accumulate(np.minimum(total, 0))
    done = np.cumsum(backwards) - waiting
    inside = np.flatnonzero(np.diff(done, prepend=0))  # the slots in which a W ends
    return np.concatenate([inside, size + np.arange(waiting[-1])])


def _held(slots: Slots) -> int:
    """Return the most chunks that the device holds, each from its F to its W."""
    weights = slots[4] if len(slots) > 4 else _fill(slots)
    size = 1 + int(weights[-1])
    forwards = np.bincount(np.concatenate(slots[:2]), minlength=size)
    return int(np.cumsum(forwards - np.bincount(weights, minlength=size)).max())


def _moved(devices: list[Slots], with_weights: bool) -> list[Slots]:
    """Move what lies in the fill (only `with_weights`) and the drain to earlier slots. [3]"""
    if with_weights:
        devices = [[*slots, _fill(slots)] for slots in devices]
    # What moves earlier holds its activation longer: not more of them than the pattern itself.
    limit, m = max(map(_held, devices)), len(devices[0][0])
    taken: list[set[int]] = [set() for _ in devices]
    phase = "fill"
    for slot, d, kind, i in sorted(
        (slot, d, kind, i)
        for d, slots in enumerate(devices)
        for kind, times in enumerate(slots)
        for i, slot in enumerate(times.tolist())
    ):
        # The fill ends when the first micro-batch is through, with B0 on device 0; the drain begins
        # when the last one has entered, with its F0.
        if phase == "fill" and (d, kind) == (0, 3):
            phase = "steady"
        if phase == "drain" or (phase == "fill" and with_weights):
            times = devices[d][kind]
            # The first free slot in which it can lie without holding too much; else it stays.
            for earlier in range(_earliest(devices, d, kind, i), slot):
                times[i] = earlier
                if earlier not in taken[d] and _held(devices[d]) <= limit:
                    break
            else:
                times[i] = slot
        elif phase == "steady" and (kind, i) == (0, m - 1):
            phase = "drain"
        taken[d].add(int(devices[d][kind][i]))
    return devices if with_weights else [[*slots, _fill(slots)] for slots in devices]


def _earliest(devices: list[Slots], d: int, kind: int, i: int) -> int:
    """Return the slot after all that this action waits for."""
    slots = devices[d]
    needs = [slots[kind][i - 1]] if i else []
    if kind == 4:
        needs.append(np.sort(np.concatenate(slots[2:4]))[i])  # the i-th W is of the i-th B
    elif kind:
        needs.append(slots[kind - 1][i])
    # F0 and B0.1 come down the V from the device before, F0.1 and B0 up from the one after.
    neighbour = d - 1 if kind in (0, 2) else d + 1
    if kind < 4 and 0 <= neighbour < len(devices):
        needs.append(devices[neighbour][kind][i])
    return 1 + int(max(needs, default=-1))


def _squeezed(devices: list[Slots]) -> list[Slots]:
    """Return the slots in which the order of these can run, each action in one. [4]"""
    simulation = simulate(_in_order(devices, ""), Costs.uniform(2 * len(devices)), check=False)
    table, start = simulation.table, simulation.start.round().astype(np.int64)
    return [
        [
            start[(table.device == d) & (table.op == OP_CODE[op]) & (table.chunk == chunk)]
            for op, chunk in KINDS
        ]
        for d in range(len(devices))
    ]


def _in_order(devices: list[Slots], name: str) -> Schedule:
    """Return the schedule of these slots. A W's slot takes any W that waits, chunk 1's first."""
    make = cache(Action)  # the devices share their actions, which are made and tabulated once
    rows = []
    for slots in devices:
        timed: list[tuple[int, Action | None]] = [
            (slot, make(op, i, chunk))
            for (op, chunk), times in zip(KINDS, slots[:4], strict=True)
            for i, slot in enumerate(times.tolist())
        ]
        timed += [(slot, None) for slot in slots[4].tolist()]
        waiting: tuple[deque[Action], ...] = (deque(), deque())  # by chunk
        row = []
        for _, action in sorted(timed, key=lambda pair: pair[0]):
            if action is None:
                backward = (waiting[1] or waiting[0]).popleft()
                action = make(Op.W, backward.micro_batch, backward.chunk)
            elif action.op is Op.B:
                waiting[action.chunk].append(action)
            row.append(action)
        rows.append(tuple(row))
    return Schedule(name, tuple(rows), len(devices[0][0]), 2, "vee")
