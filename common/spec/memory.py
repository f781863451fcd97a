"""Predict what every device of a run holds: weights, gradients, moments, activations.

    [1] `common.spec.activation_memory` knows what a micro-batch holds in every unit
    [2] `common.schedule.occupancy` knows how many micro-batches of each chunk a device holds at once
    [3] `Memory.of_device` adds both up for any cut of the model

Example: 1F1B, 2 stages: device 0 holds two micro-batches at its fullest moment, so its activations
are twice those of its units; device 1 holds one.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from common.schedule.action import Schedule
from common.schedule.occupancy import not_exceeded, occupancy
from common.schedule.table import IntArray
from common.spec.activation_memory import HeldBytes, unit_held_bytes
from common.spec.parameters import parameter_shapes, unit_of
from common.spec.partition import plan_partition, schedule_of
from common.spec.run import ELEMENT_BYTES, RunConfig
from common.spec.shards import own_tokens, shard_shape


@dataclass(frozen=True)
class DeviceMemory:
    """The bytes of one device at its fullest moment."""

    parameters: int
    weights_bytes: int
    """In the master precision; in bfloat16 also the rounded copy that the arithmetic reads."""
    gradients_bytes: int
    moments_bytes: int
    """AdamW: two numbers a parameter; SGD: one with momentum, else none."""
    activations_bytes: int
    """Held between actions, as a run counts them (`Engine.held_bytes_peak`)."""
    recompute_bytes: int
    """What a backward that computes its forward again holds besides, for one piece at a time."""

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.moments_bytes

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activations_bytes + self.recompute_bytes


OF_RECOMPUTED_TOKENS = {"paddle": 4}
"""Bytes: Paddle's recomputation keeps one number in place of an input that needs no gradient."""

Part = tuple[str, ...]
"""The kinds of a chunk's units, in order: `("embedding", "block", "block")`."""


def kinds_of(units: Sequence[str]) -> Part:
    return tuple(unit.partition(".")[0] for unit in units)


Counts = tuple[int, ...]
"""The numbers of blocks of a device's chunks."""


@dataclass(frozen=True)
class Lines:
    """What a device holds, in bytes, for every cut: the largest of these lines."""

    places: tuple[int, ...]
    """The virtual stages of its chunks, from the first to the last."""
    per_block: IntArray
    """(rows, v): what a block in chunk c adds to each line, 0 or more."""
    besides: IntArray
    """(rows,): what is held besides blocks."""
    least: Counts
    """The fewest blocks that the chunks may have: none in the first and the last of the model."""
    least_bytes: int
    """What it holds with those, where the lines may be too high: see `Memory.lines`."""


@dataclass(frozen=True)
class _Chunk:
    parameters: int
    held: Sequence[int]
    """(rows,): its activation bytes at each of the device's fullest moments."""
    again: int


@dataclass(frozen=True)
class Memory:
    """The memory of a run whose cut is still open."""

    config: RunConfig
    schedule: Schedule

    @staticmethod
    def of_run(config: RunConfig) -> list[DeviceMemory]:
        """Return the memory of every device of a run as it stands."""
        return Memory(config, schedule_of(config)).of_parts(plan_partition(config).parts)

    def of_parts(self, parts: Sequence[Sequence[str]]) -> list[DeviceMemory]:
        """Return the memory of every device, if `parts[k]` names the units of virtual stage k."""
        return [
            self.of_device(d, [kinds_of(parts[k]) for k in own])
            for d, own in enumerate(self.schedule.parts)
        ]

    def of_device(self, device: int, parts: Sequence[Part]) -> DeviceMemory:
        """Return what `device` holds, if `parts[c]` are the kinds of its chunk c's units. [3]"""
        # Chunk by chunk, and remembered: a search for a cut asks for the same chunk with other
        # partners, thousands of times.
        chunks = [self._chunk(device, c, part) for c, part in enumerate(parts)]
        parameters = sum(chunk.parameters for chunk in chunks) + self._copied(parts)
        weights, gradients, moments = self._bytes_per_parameter
        return DeviceMemory(
            parameters,
            parameters * weights,
            parameters * gradients,
            parameters * moments,
            # The fullest moment of the device, not the sum of its chunks' own fullest ones.
            max(map(sum, zip(*(chunk.held for chunk in chunks), strict=True))),
            max(chunk.again for chunk in chunks),
        )

    def lines(self, device: int) -> Lines:
        """Return `of_device(...).total_bytes` for any numbers of blocks in the device's chunks.

        Exact from the first block on, for the modes of recomputation that have no number but 1. The
        first can add more than the others: it is then the largest piece of `every-1`.
        """
        ks, last = self.schedule.parts[device], self.schedule.num_virtual_stages - 1

        def part(k: int, blocks: int) -> Part:
            return ("embedding",) * (k == 0) + ("block",) * blocks + ("head",) * (k == last)

        one, two = ([self._chunk(device, c, part(k, n)) for c, k in enumerate(ks)] for n in (1, 2))
        per_parameter = sum(self._bytes_per_parameter)
        # What one block more adds to each row of counts; and that without any, of all chunks.
        held = np.array([chunk.held for chunk in one]).T  # (rows, v)
        slope = np.array([chunk.held for chunk in two]).T - held
        tied = self._copied([part(k, 1) for k in ks])
        besides = (held - slope).sum(axis=1) + per_parameter * (
            sum(2 * a.parameters - b.parameters for a, b in zip(one, two, strict=True)) + tied
        )
        slope = slope + per_parameter * self._parameters["block"]
        # Once more for every chunk whose piece may be the largest: `full` computes all of it again.
        again = np.array([chunk.again for chunk in one])
        more = np.array([chunk.again for chunk in two]) - again
        if more.any():
            slope = (slope[:, None, :] + np.diag(more)).reshape(-1, len(ks))
            besides = (besides[:, None] + (again - more)).reshape(-1)
        else:
            besides = besides + again.max()
        # Of 200 lines 25 may ever be the largest. To find them takes longer than to look at all of
        # them, unless many blocks can be spread in many ways.
        if self.config.model.num_layers > 4 * self.schedule.num_virtual_stages:
            *of_chunks, besides = not_exceeded(np.column_stack((slope, besides))).T
            slope = np.array(of_chunks).T
        least = tuple(int(0 < k < last) for k in ks)
        fewest = [part(k, n) for k, n in zip(ks, least, strict=True)]
        return Lines(ks, slope, besides, least, self.of_device(device, fewest).total_bytes)

    @cached_property
    def all_lines(self) -> list[Lines]:
        return [self.lines(d) for d in range(self.schedule.num_devices)]

    def _copied(self, parts: Sequence[Part]) -> int:
        """Return the parameters of a tied head's copy of the embedding, on another device."""
        kinds = {kind for part in parts for kind in part}
        if not self.config.model.tied_head or "head" not in kinds or "embedding" in kinds:
            return 0
        return len(own_tokens(self.config, 0)) * self.config.model.d_model

    @cached_property
    def _bytes_per_parameter(self) -> tuple[int, int, int]:
        train = self.config.train
        master = ELEMENT_BYTES[train.master_dtype]
        # AdamW in bfloat16: 4 + 2 bytes of weights, 4 of gradients and 8 of moments make 18 a
        # parameter; in float32 there is no copy, which leaves 16.
        copy = ELEMENT_BYTES[train.dtype] if train.dtype == "bfloat16" else 0
        moments = {"adamw": 2, "sgd": int(train.momentum > 0)}[train.optimizer]
        return master + copy, master, master * moments

    def _chunk(self, device: int, c: int, part: Part) -> _Chunk:
        """Return what chunk c adds to its device, whatever the other chunks hold."""
        key = device, c, part
        if key not in self._chunks:
            # (rows, kinds, 2) counts times (kinds, 2) bytes. 1F1B, device 0 of 2: the one row is 2
            # between F and B and 0 between B and W, so the chunk holds twice what one F leaves.
            parameters, sizes, again = self._of_part(part)
            counts = self._occupancy[device][:, c].reshape(-1, len(sizes))  # (rows, kinds x 2)
            self._chunks[key] = _Chunk(parameters, (counts @ sizes).tolist(), again)
        return self._chunks[key]

    def _of_part(self, part: Part) -> tuple[int, list[int], int]:
        """Return its parameters, its bytes by kind of micro-batch, and what B computes again."""
        if part not in self._parts:
            self._parts[part] = (
                sum(self._parameters[kind] for kind in part),
                [size for kind in self._kinds for size in self._sizes(part, *kind)],
                self._again(part) if any(again for _, again in self._kinds) else 0,
            )
        return self._parts[part]

    @cached_property
    def _parts(self) -> dict[Part, tuple[int, list[int], int]]:
        return self._of_all_alike("parts", tuple(self._kinds), self.config.recompute)

    @cached_property
    def _chunks(self) -> dict[tuple[int, int, Part], _Chunk]:
        return {}

    @cached_property
    def _kinds(self) -> list[tuple[int, bool]]:
        """The kinds of micro-batches: (sequences, whether B computes the forward again)."""
        return sorted(set(self._kind_of))

    @cached_property
    def _kind_of(self) -> list[tuple[int, bool]]:
        sizes = self.config.micro_batch_sizes
        return [(size, self.config.recomputes(i)) for i, size in enumerate(sizes)]

    @property
    def recomputed(self) -> int:
        """How many micro-batches compute their forward again."""
        return sum(again for _, again in self._kind_of)

    @cached_property
    def _occupancy(self) -> list[IntArray]:
        """[2]"""
        return occupancy(self.schedule, [self._kinds.index(kind) for kind in self._kind_of])

    @cached_property
    def _parameters(self) -> dict[str, int]:
        """Of the embedding, one block and the head; of a shard, the first, which has most."""
        sizes: dict[str, int] = self._of_all_alike("parameters")
        if not sizes:
            sizes |= {"embedding": 0, "block": 0, "head": 0}
            one = self.config.model.model_copy(update={"num_layers": 1})
            for name, shape in parameter_shapes(one).items():
                own = shard_shape(self.config, name, shape, 0)
                sizes[unit_of(name).partition(".")[0]] += math.prod(own)
        return sizes

    def _sizes(self, part: Part, sequences: int, recomputed: bool) -> tuple[int, int]:
        """Return what the chunk holds between F and B, and between B and W. [1]"""
        units = [self._unit(unit, sequences) for unit in part]
        # Example: two blocks of 5 MB each and an embedding that holds nothing leave 10 MB between F
        # and B. Recomputed as a whole, they leave their input alone.
        forward = sum(held.forward for held in units)
        if recomputed:  # every piece's input alone; that of the embedding is the batch itself
            model, pieces = self.config.model, self._pieces(part)
            inputs = sum(piece[0] != "embedding" for piece in pieces)
            tokens = sequences * model.context_length
            forward = inputs * tokens * model.d_model * ELEMENT_BYTES[self.config.train.dtype]
            forward += (part[0] == "embedding") * OF_RECOMPUTED_TOKENS.get(self.config.framework, 0)
        return forward, sum(held.waiting for held in units)

    def _again(self, part: Part) -> int:
        """Return what B computes again at once: the largest piece, of the largest micro-batch."""
        sequences, _ = self._kinds[-1]
        pieces = set(self._pieces(part))
        return max(sum(self._unit(unit, sequences).forward for unit in piece) for piece in pieces)

    def _pieces(self, part: Part) -> list[Part]:
        # What is recomputed at once: `every-1` a unit, `full` all units of the chunk.
        step = self.config.recomputed_units or len(part)
        return [part[i : i + step] for i in range(0, len(part), step)]

    def _unit(self, unit: str, sequences: int) -> HeldBytes:
        if (unit, sequences) not in self._known:
            self._known[unit, sequences] = unit_held_bytes(self.config, unit, sequences)
        return self._known[unit, sequences]

    @cached_property
    def _known(self) -> dict[tuple[str, int], HeldBytes]:
        return self._of_all_alike("held")

    def _of_all_alike(self, *what: object) -> dict[Any, Any]:
        """What is known of a unit, whatever the schedule and the micro-batches: a planner asks for
        the same few numbers for every candidate.
        """
        run = self.config
        parallel = run.tensor_parallel, run.vocab_parallel
        return _remembered(what, run.framework, run.track, run.model, run.train.dtype, *parallel)


@lru_cache(maxsize=1024)
def _remembered(*of: object) -> dict[Any, Any]:
    return {}
