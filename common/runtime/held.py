"""Count what a device holds for later backwards, the same way for threads and processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable


class HeldActivations:
    """The most that a device's stage has held after any of its actions.

    Micro-batches of one kind hold the same: of one size, and with the forward computed again in B
    or not. So a stage measures each chunk once for each kind and afterwards only counts. `bytes_of`
    a micro-batch is what its F leaves for B, `waiting_bytes_of` it what its B leaves for W.
    """

    def __init__(
        self, chunks: int, kind: Callable[[int], Hashable] = lambda micro_batch: None
    ) -> None:
        self._kind = kind
        self._bytes: dict[Hashable, list[int]] = defaultdict(lambda: [0] * chunks)
        self._waiting_bytes: dict[Hashable, list[int]] = defaultdict(lambda: [0] * chunks)
        self.peak_bytes = 0
        self.peak_in_flight = 0
        """In chunks: each counts as 1 (see `Simulation.peak_chunks_in_flight_per_stage`)."""

    def bytes_of(self, micro_batch: int) -> list[int]:
        """By chunk, to be read and set; 0 until measured."""
        return self._bytes[self._kind(micro_batch)]

    def waiting_bytes_of(self, micro_batch: int) -> list[int]:
        """As `bytes_of`."""
        return self._waiting_bytes[self._kind(micro_batch)]

    def note(
        self, in_flight: Collection[tuple[int, int]], waiting: Collection[tuple[int, int]]
    ) -> None:
        """Note the (micro-batch, chunk) pairs that wait for their B and for their W."""
        # Two micro-batches that wait for their B with 10 MB each and one that waits for its W with
        # 4 MB are 24 MB. The allocator is not asked: what it keeps for later would count.
        held = sum(self.bytes_of(micro_batch)[chunk] for micro_batch, chunk in in_flight)
        held += sum(self.waiting_bytes_of(micro_batch)[chunk] for micro_batch, chunk in waiting)
        self.peak_bytes = max(self.peak_bytes, held)
        self.peak_in_flight = max(self.peak_in_flight, len(in_flight))
