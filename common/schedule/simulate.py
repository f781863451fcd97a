"""Time a schedule without running it: costs in; start times, bubbles and memory out.

    [1] `Costs` says how long F, B and W take on every stage, and a message on its way
    [2] `simulate` gives every row of the schedule's table its cost, and its message its times
    [3] `common.schedule.play` turns them into start and end times
    [4] `Simulation` reads makespan, bubbles and memory off these

The model is that of the Zero Bubble paper's tables: the order on every device is fixed; an action
starts when the previous one has ended and its message has arrived, `communication` after the
sender's action ended; sending costs the sender nothing. Over a link that is not just long but slow
a message has a `transmission` too, before which the sender's next one cannot leave. Costs are for a
device's whole share of the model: with v chunks each chunk takes 1/v of them, but every message its
full time. Where chunks are unlike (the head of a V lies on device 0) there may be a cost for every
virtual stage instead.

Example: 1F1B, 2 stages, 2 micro-batches, F = B = W = 1, so BW = 2:

    time      0   1   2   3   4   5   6   7   8   9
    device 0  F0  F1  ·   ·   BW0───  ·   BW1───         makespan 9, each device busy for 6:
    device 1  ·   F0  BW0───  F1  BW1───  ·   ·          bubble fraction 1 - 6/9 = 1/3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.schedule.action import Op, Schedule, ScheduleError
from common.schedule.play import play
from common.schedule.recompute import WORDS, is_known, recomputes
from common.schedule.table import OP_CODE, OPS, Table, tabulate
from common.schedule.validate import require_valid

FloatArray = NDArray[np.float64]

WrapAround = Literal["every", "first"]
"""With chunks in a loop: which messages between the last device and the first are waited for.

"every": all, as a run does. "first": only that of a group's first micro-batch, as the program
behind the Zero Bubble paper's tables does. Its interleaved figures come out of this rule only; they
are below a run's by up to one trip around, p x communication."""


@dataclass(frozen=True)
class Costs:
    """What one micro-batch costs, one entry per stage, or one per virtual stage in the order of the
    model. All times are in one unit, of your choice. [1]"""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    communication: tuple[float, ...]
    """Of a message that leaves this stage, whatever device it goes to: its delay on the way."""
    activation_bytes: tuple[int, ...] | None = None
    """Of one micro-batch."""
    kept_by_backward_input: float = 0.5
    """The share of an activation that B leaves held for W: 0 if W needs nothing, 1 if B frees
    nothing.

    Qi et al. 2024 count, per token of a Transformer layer, 34h + 5as bytes until B and of them 32h
    until W: 0.37 for their 1.5B and 0.43 for their 6.2B model. Without stored attention scores it
    is nearly 1.
    """
    recompute: str = "none"
    """What B computes again (`common.schedule.recompute`). Such a B takes F's time too."""
    kept_by_forward: float = 0.0
    """With recomputation: the share of an activation that F leaves held, the input of the chunk (or
    of every piece)."""
    overlap: tuple[float, ...] | None = None
    """Of a forward and a backward at the same time, on the backward's stage; by default what they
    take one after the other."""
    transmission: tuple[float, ...] | None = None
    """Of a message that leaves this stage: its bytes over the bandwidth of the device's line out,
    which carries one message after the other. By default none: a link may carry any number at once.
    """

    @classmethod
    def uniform(
        cls,
        stages: int,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        communication: float = 0.0,
    ) -> Costs:
        """Return the same costs for every stage."""
        return cls(
            forward=(forward,) * stages,
            backward_input=(backward_input,) * stages,
            backward_weight=(backward_weight,) * stages,
            communication=(communication,) * stages,
        )

    def __post_init__(self) -> None:
        # A list of the wrong length would be broadcast, or cut off, far from here.
        lengths = {
            len(self.forward),
            len(self.backward_input),
            len(self.backward_weight),
            len(self.communication),
        }
        optional = self.activation_bytes, self.overlap, self.transmission
        lengths |= {len(each) for each in optional if each is not None}
        if len(lengths) > 1:
            raise ScheduleError(
                f"costs for {sorted(lengths)} stages; expected the same number for every cost"
            )
        times = (
            *(*self.forward, *self.backward_input, *self.backward_weight),
            *(*self.communication, *(self.transmission or ()), *(self.overlap or ())),
        )
        if any(not 0 <= time < float("inf") for time in times):
            raise ScheduleError(
                f"costs {self}: a time is negative or not a number; expected 0 or more"
            )
        if not 0 <= self.kept_by_backward_input <= 1:
            raise ScheduleError(
                f"kept_by_backward_input={self.kept_by_backward_input}; expected 0 to 1"
            )
        if not 0 <= self.kept_by_forward <= 1:
            raise ScheduleError(f"kept_by_forward={self.kept_by_forward}; expected 0 to 1")
        if not is_known(self.recompute):
            raise ScheduleError(
                f"recompute={self.recompute!r}; expected {WORDS.replace('|', ', ')}"
            )

    @property
    def num_stages(self) -> int:
        return len(self.forward)

    def of(self, op: Op) -> tuple[float, ...]:
        """Return the time of `op` on every stage."""
        match op:
            case Op.F:
                return self.forward
            case Op.B:
                return self.backward_input
            case Op.W:
                return self.backward_weight
            case Op.BW:
                return tuple(
                    b + w for b, w in zip(self.backward_input, self.backward_weight, strict=True)
                )

    @property
    def message(self) -> tuple[float, ...]:
        """The time of a message that waits for no other."""
        if self.transmission is None:
            return self.communication
        return tuple(map(sum, zip(self.communication, self.transmission, strict=True)))

    @property
    def per_micro_batch(self) -> FloatArray:
        """(p,): F + B + W."""
        return np.add(self.forward, self.of(Op.BW), dtype=np.float64)


@dataclass(frozen=True)
class Simulation:
    """A schedule with a start and an end for every action, row by row as in its `table`. [4]"""

    table: Table
    costs: Costs
    start: FloatArray  # (n,)
    end: FloatArray  # (n,)
    left: FloatArray | None = None  # (n,): when the row's message has; None: at its end

    @property
    def schedule(self) -> Schedule:
        return self.table.schedule

    @cached_property
    def makespan(self) -> float:
        return float(self.end.max())

    @cached_property
    def delay(self) -> FloatArray:
        """(n,): the time that a message of this row takes, and waits for those before it."""
        queued = 0.0 if self.left is None else self.left - self.end
        return _per_row(self.table, self.costs.communication) + queued

    @cached_property
    def busy(self) -> FloatArray:
        """(p,): the time that each stage works."""
        spent = self.end - self.start
        # Rows are sorted by device, so each device is one run of rows: sum every run.
        return np.add.reduceat(spent, self.table.bounds[:-1], dtype=np.float64)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all devices: 1 - busy time of all / (p x makespan).

        With equal stages of F + B + W = T this is the paper's (makespan - m T) / makespan.
        """
        return _idle_share(self.busy.mean(), self.makespan)

    @property
    def bubble_fraction_per_stage(self) -> list[float]:
        return [_idle_share(busy, self.makespan) for busy in self.busy.tolist()]

    @cached_property
    def warm_makespan(self) -> float:
        """The largest over stages of (end - start of its first forward).

        That is what a step costs if a stage may begin the next step while the others still finish
        this one (Qi et al. 2024, section 4: an optimizer without a barrier). Their ZB-H2 and ZB-2p
        figures are counted in this way.
        """
        # A device's first action is a forward in every valid schedule.
        first = self.start[self.table.bounds[:-1]]
        last = np.maximum.reduceat(self.end, self.table.bounds[:-1])
        return float((last - first).max())

    @property
    def warm_start_bubble_fraction(self) -> float:
        return _idle_share(float(self.busy.mean()), self.warm_makespan)

    @cached_property
    def peak_chunks_in_flight_per_stage(self) -> list[int]:
        """The most forwards that wait for their B (or BW). Depends on the order alone."""
        one = np.ones((self.schedule.num_devices, self.schedule.num_chunks))
        return [round(float(peak)) for peak in _peak_held(self.table, "none", one, one, 0 * one)]

    @property
    def peak_in_flight_per_stage(self) -> list[float]:
        """The same in micro-batches on the whole stage: a chunk counts 1/v."""
        peaks = zip(self.peak_chunks_in_flight_per_stage, self.table.chunk_counts, strict=True)
        return [float(chunks / count) for chunks, count in peaks]

    @property
    def peak_memory_per_stage(self) -> list[float]:
        """The most that is held, in activations of one micro-batch on the whole stage.

        F adds 1, with recomputation `Costs.kept_by_forward`. B frees all but what W still needs
        (`Costs.kept_by_backward_input`), W or BW frees the rest. What B computes again lives within
        B alone and is not counted, as in a run (`common.runtime.held`).
        """
        return self._peak(np.ones(self.schedule.num_devices))

    @property
    def peak_bytes_per_stage(self) -> list[int] | None:
        """The same in bytes, if the costs include an activation's size."""
        if self.costs.activation_bytes is None:
            return None
        return [round(peak) for peak in self._peak(np.array(self.costs.activation_bytes))]

    def _peak(self, size: FloatArray) -> list[float]:
        """Return the most that each device holds, if an activation of each stage has this size."""
        of_chunk = np.zeros((self.schedule.num_devices, self.schedule.num_chunks))
        of_chunk[self.table.device, self.table.chunk] = _per_row(self.table, size, shared=True)
        kept = self.costs.kept_by_forward, self.costs.kept_by_backward_input
        sizes = of_chunk, kept[0] * of_chunk, kept[1] * of_chunk
        return [float(peak) for peak in _peak_held(self.table, self.costs.recompute, *sizes)]


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    check: bool = True,
    wrap_around: WrapAround = "every",
) -> Simulation:
    """Play the schedule with these costs (by default F = B = W = 1 and no communication).

    `check=False` trusts that the schedule is valid. Raises ScheduleError for one that cannot run,
    and for costs of another number of stages.
    """
    costs = costs or Costs.uniform(schedule.num_devices)
    if costs.num_stages not in (schedule.num_devices, schedule.num_virtual_stages):
        raise ScheduleError(
            f"costs for {costs.num_stages} stages; the schedule has {schedule.num_devices}"
        )
    if check:
        require_valid(schedule)
    table = tabulate(schedule)
    # [2] A B that recomputes takes F's time too.
    forward = _per_row(table, costs.forward, shared=True)
    cost = np.choose(table.op, [_per_row(table, costs.of(op), shared=True) for op in OPS])  # (n,)
    # Which rows recompute: B and BW, of the micro-batches that `recompute` names.
    again = _recomputed(table, costs.recompute) & np.isin(table.op, (OP_CODE[Op.B], OP_CODE[Op.BW]))
    # Of two that overlap the second takes the time of both, and the first none.
    if costs.overlap is not None:
        both = _per_row(table, costs.overlap, shared=True)
        cost = np.where(table.overlaps, both, cost)
    else:
        cost[table.leads + 1] += cost[table.leads]
    cost[table.leads] = 0.0
    cost += np.where(again, forward, 0.0)
    source = (
        np.where(table.trusted_wrap_arounds, -1, table.awaited)
        if wrap_around == "first"
        else table.awaited
    )
    # The sender's stage decides. Where source is -1 this looks up the last row, which play ignores.
    delay = _per_row(table, costs.communication)[source]
    busy = None
    if costs.transmission is not None:
        busy = (_per_row(table, costs.transmission) * table.messages).tolist()
    # [3]
    played = play(table, cost.tolist(), delay.tolist(), source, busy)
    start, end, left = np.array(played.start), np.array(played.end), np.array(played.left)
    start[table.leads] = end[table.leads] = left[table.leads] = start[table.leads + 1]
    return Simulation(table, costs, start, end, left)


def _per_row(table: Table, values: ArrayLike, shared: bool = False) -> FloatArray:
    """Return (n,): the entry of each row's stage, `shared` evenly by its chunks, or that of its
    virtual stage."""
    array = np.array(values, np.float64)
    if len(array) == table.schedule.num_devices:
        return (array / table.chunk_counts if shared else array)[table.device]
    return array[table.virtual_stage]


def peak_held_bytes(
    schedule: Schedule,
    forward_bytes: Sequence[Sequence[int]],
    recomputed_bytes: Sequence[Sequence[int]],
    waiting_bytes: Sequence[Sequence[int]],
    recompute: str = "none",
) -> list[int]:
    """Return, per device, the most bytes held after any action.

    Sizes are what one micro-batch of `[device][chunk]` holds: `forward_bytes` between F and B,
    `recomputed_bytes` the same if B computes it again, `waiting_bytes` between B and W. With the
    sizes that a run has measured this must give the run's own peak (`Engine.held_bytes_peak`).
    """
    sizes = [
        np.array(each, np.float64) for each in (forward_bytes, recomputed_bytes, waiting_bytes)
    ]
    return [round(float(peak)) for peak in _peak_held(tabulate(schedule), recompute, *sizes)]


def _recomputed(table: Table, recompute: str) -> NDArray[np.bool_]:
    """Return (n,): whether the row is of a micro-batch whose B computes its forward again."""
    m = table.schedule.num_micro_batches
    return np.array([recomputes(recompute, i, m) for i in range(m)])[table.micro_batch]


def _peak_held(
    table: Table, recompute: str, forward: FloatArray, recomputed: FloatArray, waiting: FloatArray
) -> FloatArray:
    """Return (p,): the most held per device; sizes are (p, v)."""
    place = table.device, table.chunk
    # What a row's micro-batch holds between its F and its B, whichever of the two the row is.
    until_backward = np.where(
        _recomputed(table, recompute), recomputed[place], forward[place]
    )  # (n,)
    change = {  # (n,) each: what an action of this kind adds
        Op.F: until_backward,
        Op.B: waiting[place] - until_backward,
        Op.W: -waiting[place],
        Op.BW: -until_backward,
    }
    # One running sum over all rows; what the devices before have left (0 if valid) is taken off.
    held = np.cumsum(np.choose(table.op, [change[op] for op in OPS]))
    first = table.bounds[:-1]
    before = np.where(first > 0, held[first - 1], 0.0)
    return np.asarray(np.maximum.reduceat(held, first) - before)


def per_stage(
    values: Sequence[float], stages: int, what: str, virtual_stages: int | None = None
) -> tuple[float, ...]:
    """Return one number per stage from one for all or one for each, or the numbers of all virtual
    stages. Raises ScheduleError for any other number of them."""
    if len(values) == 1:
        return (values[0],) * stages
    if len(values) not in (stages, virtual_stages):
        counts = f"1 or {stages}" if virtual_stages is None else f"1, {stages} or {virtual_stages}"
        raise ScheduleError(f"{what}: {len(values)} numbers for {stages} stages; expected {counts}")
    return tuple(values)


def per_virtual_stage(
    values: tuple[float, ...], schedule: Schedule, shared: bool = True
) -> tuple[float, ...]:
    """Return one number per virtual stage from as many, or from one per stage: its chunks' share of
    it, or (not `shared`) the whole."""
    if len(values) == schedule.num_virtual_stages:
        return values
    share = [len(parts) if shared else 1 for parts in schedule.parts]
    return tuple(values[device] / share[device] for device, _ in schedule.location)


def _idle_share(busy: float, time: float) -> float:
    return 1.0 - busy / time if time else 0.0  # all costs 0: nothing is idle
