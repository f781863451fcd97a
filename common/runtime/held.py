"""Counts what a device holds for backwards to come: micro-batches and bytes, the same way for threads and processes."""

from __future__ import annotations

from collections.abc import Callable, Collection


class HeldActivations:
    """The most that a device's stage has held after any of its actions.

    Every micro-batch holds the same, so a stage measures each chunk once and afterwards only counts: `forward_bytes` of a
    chunk is what its F leaves for B, `recomputed_bytes` the same of a micro-batch whose B computes the forward again, and
    `waiting_bytes` what its B leaves for W.
    """

    def __init__(self, chunks: int, recomputes: Callable[[int], bool] = lambda micro_batch: False) -> None:
        self._recomputes = recomputes
        self.forward_bytes = [0] * chunks
        self.recomputed_bytes = [0] * chunks
        self.waiting_bytes = [0] * chunks
        self.peak_bytes = 0
        self.peak_in_flight = 0
        """Of chunks: each counts as one (`common.schedule.simulate.Simulation.peak_chunks_in_flight_per_stage`)."""

    def bytes_of(self, micro_batch: int) -> list[int]:
        """By chunk: what this micro-batch's F leaves for B; 0 until it is measured."""
        return self.recomputed_bytes if self._recomputes(micro_batch) else self.forward_bytes

    def note(self, in_flight: Collection[tuple[int, int]], waiting: Collection[tuple[int, int]]) -> None:
        """Takes the (micro-batch, chunk) pairs that wait for their B and for their W."""
        held = sum(
            (self.recomputed_bytes if self._recomputes(micro_batch) else self.forward_bytes)[chunk]
            for micro_batch, chunk in in_flight
        )
        held += sum(self.waiting_bytes[chunk] for _, chunk in waiting)
        self.peak_bytes = max(self.peak_bytes, held)
        self.peak_in_flight = max(self.peak_in_flight, len(in_flight))
