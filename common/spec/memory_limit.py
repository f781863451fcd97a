"""Cut the model so that every device stays within its memory, and no device is slower than need be.

The devices of a pipeline differ twice: the first holds the embedding and the most micro-batches in
flight, the last the head and its logits. Under a limit the best cut that fits usually gives the
first device fewer blocks than the others, which no even split does.

    [1] `Room.split`        of the ways to spread n blocks over a device's chunks, the most even one that fits
    [2] `balanced_within`   the largest device that has to be, then the largest part
    [3] `least_limit`       the smallest limit under which there is a cut at all

Whatever fits still fits with a block less in some chunk (`Lines`). So all that matters of a device is
how many blocks it has room for, and both searches are bisections: a model of L blocks has a cut where
the devices together have room for L.

Example: one block costs 1, three devices have room for 2, 5 and 9 blocks, and there are 12. With a
largest device of 4 they hold 2 + 4 + 4; with one of 5, 2 + 5 + 5, which is enough: 2 5 5.
"""  # noqa: E501

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.schedule.table import IntArray
from common.spec.memory import Counts, Lines


class Room:
    """One device: how many blocks fit, and how they are spread over its chunks. [1]

    `own` is what each chunk costs besides its blocks, which cost `block` each.
    """

    def __init__(self, lines: Lines, limit_bytes: float, own: Sequence[float], block: float):
        self.lines, self.own, self.block = lines, own, block
        self.limit_bytes = int(limit_bytes)
        self.fewest = sum(lines.least)
        # No more than if every block were in the chunk where it takes least.
        free, cheapest = self.limit_bytes - lines.besides, lines.per_block.min(axis=1)
        most = np.where(cheapest > 0, free // np.maximum(cheapest, 1), 2**62).min()
        self.too_many = max(int(most) if (free >= 0).all() else 0, self.fewest) + 1
        self._known: dict[int, tuple[float, Counts] | None] = {}

    @property
    def has_any(self) -> bool:
        return self.lines.least_bytes <= self.limit_bytes

    def load(self, blocks: int) -> float:
        return sum(self.own) + blocks * self.block

    def most(self, up_to: int) -> int:
        """Return the most blocks that fit, if no more than `up_to` are asked for."""
        up_to = min(up_to, self.too_many - 1)
        if up_to <= self.fewest or self.split(up_to) is not None:
            return up_to
        more = range(self.fewest + 1, up_to)
        found = self.fewest + bisect_left(more, True, key=lambda n: self.split(n) is None)
        self.too_many = found + 1
        return found

    def split(self, blocks: int) -> tuple[float, Counts] | None:
        """Return (largest part, blocks of every chunk) with the smallest largest part that fits."""
        if blocks not in self._known:
            self._known[blocks] = self._split(blocks)
        return self._known[blocks]

    def _split(self, blocks: int) -> tuple[float, Counts] | None:
        lines, least = self.lines, self.lines.least
        if blocks == self.fewest:
            return (self._largest(least), least) if self.has_any else None
        if len(least) == 1:
            fits = (lines.per_block[:, 0] * blocks + lines.besides <= self.limit_bytes).all()
            return (self.load(blocks), (blocks,)) if fits else None
        # All chunks but the last two are tried with every number of blocks. Then x blocks in the
        # last but one leave the rest to the last, so each line is a bound on x, from one side.
        heads = np.array(least[:-2], np.int64) + _up_to(blocks - self.fewest, len(least) - 2)
        rest = blocks - heads.sum(axis=1)  # (ways,)
        free = self.limit_bytes - lines.besides - rest[:, None] * lines.per_block[:, -1]
        free = free - heads @ lines.per_block[:, :-2].T  # (ways, rows)
        slope = lines.per_block[:, -2] - lines.per_block[:, -1]  # (rows,)
        up, down = slope > 0, slope < 0
        low = (-(free[:, down] // -slope[down])).max(axis=1, initial=least[-2])
        high = (free[:, up] // slope[up]).min(axis=1, initial=blocks)
        high = np.minimum(high, rest - least[-1])
        fitting = (low <= high) & (free[:, slope == 0] >= 0).all(axis=1)
        if not fitting.any():
            return None
        heads, rest, low, high = heads[fitting], rest[fitting], low[fitting], high[fitting]
        # 5 blocks for the last two: 2 or 3 in the last but one make them alike, as far as they fit.
        tilt = (self.own[-1] - self.own[-2]) / self.block if self.block else 0.0
        even = ((rest + tilt) // 2).astype(np.int64)
        x = np.array([np.clip(even, low, high), np.clip(even + 1, low, high)])  # (2, ways)
        sizes = np.maximum(self.own[-2] + x * self.block, self.own[-1] + (rest - x) * self.block)
        sizes = np.maximum(
            sizes.min(axis=0), (np.array(self.own[:-2]) + heads * self.block).max(axis=1, initial=0)
        )
        # Of those that are as even, the one with the fewest blocks in the first chunks: what they
        # hold stays the longest, and the devices behind can begin the sooner.
        best = int(sizes.argmin())
        size, head = float(sizes[best]), tuple(heads[best].tolist())
        ways = ((*head, x, int(rest[best]) - x) for x in itertools.count(int(low[best])))
        return size, next(counts for counts in ways if self._largest(counts) <= size)

    def _largest(self, counts: Counts) -> float:
        return max(own + n * self.block for own, n in zip(self.own, counts, strict=True))


@lru_cache(maxsize=256)
def _up_to(total: int, chunks: int) -> IntArray:
    """Return (ways, chunks): every way to put at most `total` blocks into so many chunks."""
    ways = np.indices((total + 1,) * chunks).reshape(chunks, -1).T if chunks else np.zeros((1, 0))
    few: IntArray = ways[ways.sum(axis=1) <= total].astype(np.int64)
    return few


def balanced_within(
    costs: tuple[float, float, float], num_layers: int, lines: Sequence[Lines], limit_bytes: float
) -> list[int] | None:
    """Return the boundaries with the smallest largest device, then the smallest largest part.

    `costs` are of the embedding, a block and the head, and `lines` has one for every device. None:
    no cut fits. [2]
    """
    embedding, block, head = costs
    last = sum(len(each.places) for each in lines) - 1
    own = [embedding * (k == 0) + head * (k == last) for k in range(last + 1)]
    rooms = [Room(each, limit_bytes, [own[k] for k in each.places], block) for each in lines]
    if not all(room.has_any for room in rooms):
        return None
    loads = [[room.load(n) for n in range(num_layers + 1)] for room in rooms]

    # What a device may cost at most: first the sum of its parts, to set the pace ...
    def counts_within(largest: float) -> list[int] | None:
        """Return how many blocks every device holds at most, or None if that is too few."""
        ours = [bisect_right(load, largest) - 1 for load in loads]
        have_least = all(n >= room.fewest for n, room in zip(ours, rooms, strict=True))
        if not have_least or sum(ours) < num_layers:
            return None
        most = [room.most(n) for n, room in zip(ours, rooms, strict=True)]
        return most if sum(most) >= num_layers else None

    sizes = sorted(set(itertools.chain(*loads)))
    fastest = bisect_left(sizes, True, key=lambda size: counts_within(size) is not None)
    if fastest == len(sizes):
        return None
    most = counts_within(sizes[fastest])
    assert most is not None
    # ... then each part of it. At most so many blocks are more than there are, so no device holds
    # fewer than that below its most.
    spare = sum(most) - num_layers
    ways = [
        [(way[0], n) for n in range(max(room.fewest, n - spare), n + 1) if (way := room.split(n))]
        for n, room in zip(most, rooms, strict=True)
    ]

    def within(part: float) -> list[int]:
        """Return how many blocks each device holds at most within it, or [] if one holds none."""
        blocks = [[n for size, n in each if size <= part] for each in ways]
        return [max(each) for each in blocks] if all(blocks) else []

    parts = sorted({size for each in ways for size, _ in each})
    part = parts[bisect_left(parts, True, key=lambda part: sum(within(part)) >= num_layers)]
    return _boundaries(rooms, num_layers, within(part))


def least_limit(num_layers: int, lines: Sequence[Lines], below: int) -> list[int] | None:
    """Return the boundaries of the cut that fits under the smallest limit, in bytes. [3]

    None if it is not less than `below`, which is soon known.
    """

    def rooms_under(limit_bytes: int) -> list[Room]:
        return [Room(each, limit_bytes, [0.0] * len(each.places), 1.0) for each in lines]

    def has_cut(limit_bytes: int) -> bool:
        rooms = rooms_under(limit_bytes)
        if not all(room.has_any for room in rooms):
            return False
        # First what each device could hold at most, which is soon said, then what it holds.
        held = [min(room.too_many - 1, num_layers) for room in rooms]
        for d, room in enumerate(rooms):
            if sum(held) < num_layers:
                return False
            held[d] = room.most(num_layers)
        return sum(held) >= num_layers

    if not has_cut(below - 1):
        return None
    limit = bisect_left(range(below - 1), True, key=has_cut)
    rooms = rooms_under(limit)
    most = [room.most(num_layers) for room in rooms]
    return _boundaries(rooms, num_layers, most)


def _boundaries(rooms: Sequence[Room], num_layers: int, most: Sequence[int]) -> list[int]:
    """Return the boundaries of a cut in which no device has more blocks than `most`."""
    blocks = list(most)
    while sum(blocks) > num_layers:  # the one with the most work has one fewer
        free = [d for d, room in enumerate(rooms) if blocks[d] > room.fewest]
        blocks[max(free, key=lambda d: (rooms[d].load(blocks[d]), d))] -= 1
    counts: dict[int, int] = {}
    for room, n in zip(rooms, blocks, strict=True):
        way = room.split(n)
        assert way is not None
        counts |= zip(room.lines.places, way[1], strict=True)
    return [1 + n for n in itertools.accumulate(counts[k] for k in sorted(counts))][:-1]
