"""A schedule as flat arrays, for the code that must take a million actions in seconds.

[1] Rows are the actions of device 0, then those of device 1, and so on. For 2 devices and 2
    micro-batches of 1F1B:

        row          0    1    2    3   │  4    5    6    7       bounds = [0, 4, 8]
        action       F0   F1   BW0  BW1 │  F0   BW0  F1   BW1
        device       0    0    0    0   │  1    1    1    1

[2] A slot is the place of one result: (F, B or W; micro-batch i; virtual stage k), for m
    micro-batches and K virtual stages. Slots are numbered as in a C array of shape (3, m, K), so
    one flat array has them all:

        slot = (code x m + i) x K + k             code: F 0, B 1, W 2
        e.g. B of micro-batch 1 on virtual stage 0: (1 x 2 + 1) x 2 + 0 = 6

[3] `producer[slot]` is the row that fills a slot, -1 if none does. Row 3 (BW1 on device 0) is both
    B and W, so it fills slots 6 and (2 x 2 + 1) x 2 + 0 = 10.

[4] `needs` looks the other way: the slots that every row needs, by `common.schedule.dependencies`.
    Row 3 needs F1 here (slot 2, which row 1 fills) and B1 of the next stage (slot 7, row 7).

[5] `source[row]` is the one row on another device that a row waits for: source[3] = 7. The
    simulator and the validator need no more than this to play a schedule.

[6] Two actions that overlap are two rows, of which the second takes the time of both: the first is
    over in no time, and whoever needs its result waits for the second (`awaited`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from common.schedule.action import Action, Op, Schedule, words
from common.schedule.dependencies import GIVES, NEEDS

IntArray = NDArray[np.int64]

OPS = tuple(Op)
OP_CODE = {op: code for code, op in enumerate(OPS)}
_RESULT_CODE = {Op.F: 0, Op.B: 1, Op.W: 2}  # BW is no result of its own: it fills B and W


@dataclass(frozen=True)
class Table:
    """The columns of a schedule's n actions [1], and what follows from them.

    A schedule may be invalid, since the validator works on tables too: only actions within range
    get a slot, and a slot may have no producer, or several rows that would fill it.
    """

    schedule: Schedule
    bounds: IntArray
    """(p + 1,): device d has the rows bounds[d] to bounds[d + 1]."""
    device: IntArray  # (n,)
    op: IntArray  # (n,) index into OPS
    micro_batch: IntArray  # (n,)
    chunk: IntArray  # (n,)
    overlaps: NDArray[np.bool_]  # (n,): runs together with the row before it

    @property
    def num_rows(self) -> int:
        return len(self.op)

    @cached_property
    def in_range(self) -> NDArray[np.bool_]:
        """(n,): whether the schedule has this micro-batch and this chunk."""
        return (self.micro_batch < self.schedule.num_micro_batches) & (self.virtual_stage >= 0)

    @cached_property
    def chunk_counts(self) -> IntArray:
        """(p,)"""
        return np.array([len(row) for row in self.schedule.parts])

    @cached_property
    def virtual_stage(self) -> IntArray:
        """(n,); -1 for a chunk that is out of range."""
        # Devices may have different numbers of chunks: what a short row lacks stays -1.
        of = np.full((self.schedule.num_devices, self.schedule.num_chunks), -1)  # (p, v)
        for device, row in enumerate(self.schedule.parts):
            of[device, : len(row)] = row
        known = self.chunk < self.schedule.num_chunks
        return np.where(known, of[self.device, np.where(known, self.chunk, 0)], -1)

    def slots(self, result: Op, rows: IntArray, offset: int = 0) -> IntArray:
        """Return the slot of `result` for each row's micro-batch, `offset` virtual stages on. [2]

        -1 where that lies beyond the model's ends.
        """
        stages = self.schedule.num_virtual_stages
        k = self.virtual_stage[rows] + offset
        slot = (
            _RESULT_CODE[result] * self.schedule.num_micro_batches + self.micro_batch[rows]
        ) * stages + k
        return np.where((k >= 0) & (k < stages), slot, -1)

    def describe_slot(self, slot: int) -> tuple[Op, int, int]:
        """Return (operation, micro-batch, virtual stage) of a slot: `slots` inverted."""
        rest, k = divmod(slot, self.schedule.num_virtual_stages)
        code, micro_batch = divmod(rest, self.schedule.num_micro_batches)
        return next(op for op, c in _RESULT_CODE.items() if c == code), micro_batch, k

    @property
    def num_slots(self) -> int:
        return 3 * self.schedule.num_micro_batches * self.schedule.num_virtual_stages

    def rows_of(self, op: Op) -> IntArray:
        return np.flatnonzero((self.op == OP_CODE[op]) & self.in_range)

    @cached_property
    def results(self) -> tuple[IntArray, IntArray]:
        """(slots, rows): which row fills which slot, one entry per result; BW has two."""
        pairs = [
            (self.slots(result, self.rows_of(op)), self.rows_of(op))
            for op in Op
            for result in GIVES[op]
        ]
        return np.concatenate([s for s, _ in pairs]), np.concatenate([r for _, r in pairs])

    @cached_property
    def producer(self) -> IntArray:
        """(num_slots,): the first row that fills each slot, -1 where none does. [3]"""
        # Row by row it is a dictionary of a million entries; `minimum.at` does all in one pass.
        slots, rows = self.results
        producer = np.full(self.num_slots, self.num_rows, np.int64)  # (num_slots,)
        np.minimum.at(producer, slots, rows)  # the first, if a schedule repeats an action
        return np.where(producer < self.num_rows, producer, -1)

    @cached_property
    def needs(self) -> tuple[tuple[Op, Op, int, IntArray, IntArray], ...]:
        """Every dependency, by kind. [4]

        (operation, needed operation, offset, its rows, the slots that these rows need).
        """
        found = []
        for op, needed in NEEDS.items():
            for result, offset in needed:
                rows = self.rows_of(op)
                slots = self.slots(result, rows, offset)
                # At the model's ends there is no slot, and so no dependency.
                found.append((op, result, offset, rows[slots >= 0], slots[slots >= 0]))
        return tuple(found)

    @cached_property
    def source(self) -> IntArray:
        """(n,): the row on another device whose message each row waits for, -1 for none. [5]

        One is enough: in `NEEDS` no operation has two neighbours, and what it needs from its own
        device comes earlier in the list.
        """
        source = np.full(self.num_rows, -1, np.int64)  # (n,)
        for _, _, _, rows, slots in self.needs:
            producer = self.producer[slots]
            remote = (producer >= 0) & (self.device[producer] != self.device[rows])
            source[rows[remote]] = producer[remote]
        return source

    @cached_property
    def receives(self) -> NDArray[np.bool_]:
        """(n,): whether a row's input comes from another virtual stage, on whatever device."""
        receives = np.zeros(self.num_rows, np.bool_)
        for _, _, offset, rows, _ in self.needs:
            receives[rows] |= offset != 0
        return receives

    @cached_property
    def leads(self) -> IntArray:
        """The rows whose next row overlaps with them."""
        return np.flatnonzero(self.overlaps) - 1

    @cached_property
    def awaited(self) -> IntArray:
        """(n,): the row whose end each row waits for, -1 for none. [6]"""
        ends = np.arange(self.num_rows)  # (n,)
        ends[self.leads] += 1
        return np.where(self.source >= 0, ends[self.source], -1)

    @cached_property
    def messages(self) -> IntArray:
        """(n,): how many messages leave for other devices when each row ends."""
        return np.bincount(self.awaited[self.awaited >= 0], minlength=self.num_rows)

    @cached_property
    def trusted_wrap_arounds(self) -> NDArray[np.bool_]:
        """(n,): rows that receive from the devices' other end and are not the first of their group.

        A group is a run of micro-batches that pass through one chunk one after the other. Only a
        loop of chunks has such rows; `common.schedule.simulate.WrapAround` says what they are for.
        """
        # A row follows in its group if its device's row of that operation before it has its chunk.
        follows = np.zeros(self.num_rows, np.bool_)  # (n,)
        for op in (Op.F, Op.B, Op.BW):
            rows = self.rows_of(op)
            same = (self.device[rows][1:] == self.device[rows][:-1]) & (
                self.chunk[rows][1:] == self.chunk[rows][:-1]
            )
            follows[rows[1:]] = same
        # From device p - 1 to device 0, or back. Next to each other (distance 1) is no way around.
        distance = np.abs(self.device[self.source] - self.device)
        wraps = (self.source >= 0) & (distance == self.schedule.num_devices - 1) & (distance > 1)
        if self.schedule.placement != "loop":
            return np.zeros(self.num_rows, np.bool_)
        if self.schedule.num_devices == 2:
            # With 2 devices the way around is as short as the way on; only the direction tells them
            # apart: an F that device 0 receives has gone around, and so has a B on device 1.
            forward = self.op == OP_CODE[Op.F]
            wraps = (self.source >= 0) & (self.device[self.source] == np.where(forward, 1, 0))
        return np.array(follows & wraps, np.bool_)

    def action(self, row: int) -> Action:
        return Action(
            OPS[self.op[row]],
            int(self.micro_batch[row]),
            int(self.chunk[row]),
            bool(self.overlaps[row]),
        )

    def label(self, row: int) -> str:
        """Return the row's word in the text form; the first of two that overlap has none."""
        first = row - int(self.overlaps[row])
        return words(self.action(each) for each in range(first, row + 1))[0]

    @cached_property
    def _words_before(self) -> IntArray:
        return np.arange(self.num_rows) - np.cumsum(self.overlaps)

    def position(self, row: int) -> int:
        """Return the place of the row's word in its device's list, from 0."""
        return int(self._words_before[row] - self._words_before[self.bounds[self.device[row]]])


def tabulate(schedule: Schedule) -> Table:
    """Return the arrays of a schedule.

    Generators put one Action object into many lists. Reading attributes is the slow part, so each
    object is read once and its values are copied to all its rows.
    """
    lengths = np.array([len(row) for row in schedule.devices], np.int64)  # (p,)
    total = int(lengths.sum())
    identities = np.fromiter(map(id, chain.from_iterable(schedule.devices)), np.int64, total)
    # inverse[row] is the number of the row's distinct object, first[number] its first row.
    _, first, inverse = np.unique(identities, return_index=True, return_inverse=True)
    bounds = np.concatenate([[0], np.cumsum(lengths)])  # (p + 1,)
    device_of_first = np.searchsorted(bounds, first, side="right") - 1
    distinct = [
        schedule.devices[d][row - bounds[d]]
        for d, row in zip(device_of_first.tolist(), first.tolist(), strict=True)
    ]
    columns = np.array(
        [(OP_CODE[a.op], a.micro_batch, a.chunk, a.overlaps) for a in distinct], np.int64
    ).reshape(-1, 4)
    op, micro_batch, chunk, overlaps = columns[inverse].T
    device = np.repeat(np.arange(len(lengths)), lengths)
    return Table(schedule, bounds, device, op, micro_batch, chunk, overlaps.astype(np.bool_))
