"""Cut the model so that every device stays within its memory, and no device is slower than need be.

The devices of a pipeline differ twice: the first holds the embedding and the most micro-batches in
flight, the last the head and its logits. Under a limit the fastest cut that fits gives the first
device fewer blocks than the others, which no even split does.

    [1] `split`    of the ways to spread t blocks over a device's chunks, the evenest that fits
    [2] greedy     every next block goes to the device with the least work that has room for one more
    [3] bisection  of all cuts that are as fast, one with the smallest largest part

[2] is exact by the proof in `common.spec.partition.balanced_over_devices`, in which a device has
room for so many blocks: here memory decides how many.
"""  # noqa: E501

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache

Fits = Callable[[int, tuple[int, ...]], bool]
"""Whether (device, the numbers of blocks of its chunks) stays within the device's memory. With a
block less in some chunk it must still fit."""


def balanced_within(
    costs: tuple[float, float, float], num_layers: int, devices: Sequence[int], fits: Fits
) -> list[int] | None:
    """Return the boundaries with the smallest largest device, then the smallest largest part.

    `costs` are of the embedding, a block and the head, `devices[k]` is part k's. None: no cut fits.
    """
    last, block = len(devices) - 1, costs[1]
    # What a part costs besides its blocks.
    own = [costs[0] * (k == 0) + costs[2] * (k == last) for k in range(last + 1)]
    parts = {d: [k for k in range(last + 1) if devices[k] == d] for d in set(devices)}
    least = {d: tuple(int(0 < k < last) for k in ks) for d, ks in parts.items()}

    def largest(d: int, counts: Sequence[int]) -> float:
        return max(own[k] + n * block for k, n in zip(parts[d], counts, strict=True))

    @cache
    def split(d: int, blocks: int) -> tuple[float, tuple[int, ...]] | None:
        """(largest part, blocks of every chunk) with the smallest largest part that fits. [1]"""
        # 3 blocks for two chunks, of which the second needs one: (2, 1), (1, 2), (0, 3). Tried from
        # the evenest on, since a chunk's place in the pipeline decides what its activations take.
        ways = [
            tuple(map(sum, zip(least[d], more, strict=True)))
            for more in _spread(blocks - sum(least[d]), len(least[d]))
        ]
        sized = sorted((largest(d, counts), counts) for counts in ways)
        return next((way for way in sized if fits(d, way[1])), None)

    def fill(bound: float) -> tuple[float, dict[int, int]]:
        """Return the largest device and the blocks of each, with no part above `bound`. [2]"""

        def has_room(d: int, blocks: int) -> bool:
            way = split(d, blocks)
            return way is not None and way[0] <= bound

        blocks = {d: sum(counts) for d, counts in least.items()}
        if not all(has_room(d, n) for d, n in blocks.items()):
            return float("inf"), blocks

        def load(d: int) -> float:
            return sum(own[k] for k in parts[d]) + blocks[d] * block

        for _ in range(num_layers - sum(blocks.values())):
            # A device that is full now stays full: a block more never takes less memory (`Fits`).
            open_devices = [d for d in parts if has_room(d, blocks[d] + 1)]
            if not open_devices:
                return float("inf"), blocks
            # The device with the least work, not with the most room: memory only says who may.
            blocks[min(open_devices, key=lambda d: (load(d), d))] += 1
        return max(map(load, parts)), blocks

    # First how fast it can be at all, then with how even parts it still is as fast.
    best, _ = fill(float("inf"))
    if best == float("inf"):
        return None
    # All sizes that a part can have. A lower bound on the parts can only make the largest device
    # larger, so the smallest bound that leaves it as it is lies where the answer changes.
    bounds = sorted({o + n * block for o in own for n in range(num_layers + 1)})
    bound = bounds[bisect_left(bounds, True, key=lambda each: fill(each)[0] <= best)]  # [3]
    counts = [0] * (last + 1)
    for d, blocks in fill(bound)[1].items():
        way = split(d, blocks)
        assert way is not None
        for k, n in zip(parts[d], way[1], strict=True):
            counts[k] = n
    return [1 + n for n in itertools.accumulate(counts)][:-1]


def _spread(blocks: int, chunks: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to put so many blocks into so many chunks."""
    if chunks == 1:
        yield (blocks,)
        return
    for first in range(blocks + 1):
        for rest in _spread(blocks - first, chunks - 1):
            yield (first, *rest)
