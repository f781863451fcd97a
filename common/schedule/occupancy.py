"""Count what a device holds, chunk by chunk, whatever the sizes: the counts that decide its peak.

After every action a device holds so many micro-batches of each chunk between F and B, and so many
between B and W. Of those rows of counts only the ones that no other row exceeds everywhere can be
the peak, whatever a micro-batch takes. 1F1B on device 0 of 2, 4 micro-batches: after F0 F1 BW0 F2
the counts are 1, 2, 1, 2: all that remains is one row, 2. So a planner plays a schedule once and
then tries thousands of partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.schedule.action import Op, Schedule
from common.schedule.table import OP_CODE, IntArray, tabulate


def occupancy(schedule: Schedule, kinds: Sequence[int] | None = None) -> list[IntArray]:
    """Return, per device, the largest counts of what is held: (rows, v, kinds, 2).

    `kinds[i]` is the kind of micro-batch i, from 0: kinds differ in what they take (one sequence
    more, the forward computed again). The last axis: between F and B, between B and W.
    """
    return _counts(schedule, tuple(kinds or [0] * schedule.num_micro_batches))


remembered_table = lru_cache(maxsize=16)(tabulate)
"""A planner wants it once more, to play the schedule."""


@lru_cache(maxsize=16)  # a planner asks once for each kind of recomputation
def _counts(schedule: Schedule, kinds: tuple[int, ...]) -> list[IntArray]:
    table = remembered_table(schedule)
    shape = (table.num_rows, schedule.num_chunks, max(kinds) + 1)
    # A row is one action: F adds a held activation, B turns it into what waits for W, W frees it.
    # The sum over the rows so far is what is held after each action.
    between = np.zeros((*shape, 2), np.int64)  # (n, v, kinds, 2)
    row, kind = np.arange(table.num_rows), np.array(kinds)[table.micro_batch]
    for op, forward, waiting in ((Op.F, 1, 0), (Op.B, -1, 1), (Op.W, 0, -1), (Op.BW, -1, 0)):
        rows = row[table.op == OP_CODE[op]]
        between[rows, table.chunk[rows], kind[rows]] = forward, waiting
    return [
        _fullest(between[a:b]) for a, b in zip(table.bounds[:-1], table.bounds[1:], strict=True)
    ]


def _fullest(changes: IntArray) -> IntArray:
    """Return what is held after each action, where no other holds as much in every place."""
    counts, places = np.cumsum(changes, axis=0), tuple(range(1, changes.ndim))
    # Of F F BW only the second F is worth a look: BW holds less than the F before it, and the
    # first F less than the one behind it.
    frees, adds = np.all(changes <= 0, places), np.all(changes >= 0, places)
    counts = counts[~(frees | np.append(adds[1:], False))]
    kept: IntArray = not_exceeded(counts.reshape(len(counts), -1)).reshape(-1, *changes.shape[1:])
    return kept


def not_exceeded(rows: IntArray) -> IntArray:
    """Return the rows that no other row reaches or exceeds in every place."""
    # (2, 0) is below (2, 1) whatever the sizes; (3, 0) and (2, 1) both stay, as either may be more.
    # A set: of so few rows np.unique takes ten times as long to find the different ones.
    flat = np.array(sorted(set(map(tuple, rows.tolist()))))
    # Some rows at a time, each beside all; every row reaches itself.
    some = np.array_split(flat, 1 + flat.size * len(flat) // 2**22)
    exceeded = np.concatenate([(flat >= rows[:, None]).all(2).sum(1) > 1 for rows in some])
    kept: IntArray = flat[~exceeded]
    return kept
