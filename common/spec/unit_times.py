"""What every unit of a model takes, in seconds: measured by a profile, or counted.

A profile holds F, B, W and BW of the embedding, a block and the head for several micro-batch sizes,
and what an action takes besides, however many units it has (a message, the host's own work):

    action of 3 blocks    ├─ action ─┼─ block ─┼─ block ─┼─ block ─┤

Preset deep48, four stages, four sequences: a block alone takes 3.2 ms, 12 of them 22.8. So a block
is 1.8 ms and an action 1.4, and 12 times the first number would be 66 % too much.

Between two sizes time is a straight line; beyond the largest it goes on as between the last two.
Its value at size 0 is what a micro-batch costs however small it is, which is what limits m:

    seconds      ·  measured
    of a block      ·   seconds(b) = a0 + a1 b between neighbours
                 ·
             a0 ┤
                └────┴────┴────────┴──  sequences b

Measured 2, 3 and 5 ms for 1, 2 and 4 sequences: a block takes 4 ms for 3 and 9 ms for 8, and 1 ms
is there whatever the size. 8 micro-batches of 1 then take 16 ms where one of 8 takes 9.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from common.schedule.action import Op
from common.spec.partition import unit_costs
from common.spec.run import RunConfig

KINDS = ("embedding", "block", "head")
ACTION = "action"
"""What every action takes besides its units, among the kinds; counted times have none."""

Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
"""Of one action: more than eleven days is a mistake."""
BySize = Annotated[Mapping[PositiveInt, Seconds], Field(min_length=1)]


class UnitTimes(BaseModel):
    """The costs that a plan is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Where they are from, for people."""
    seconds: Mapping[str, Mapping[str, BySize]]
    """By kind of unit, or ACTION, operation and sequences in a micro-batch."""
    hop_seconds: Seconds = 0.0
    """From the end of a sender to the start of a receiver that was waiting."""
    receive_seconds: Seconds = 0.0
    """What an action takes to get a message that is there already."""
    rest_seconds: Seconds = 0.0
    """A step outside the pipeline, whatever the model: batch in, loss out."""
    optimizer_seconds_per_parameter: Seconds = 0.0
    """The norm, clipping and the update, on the device that has the most parameters."""
    link_bytes_per_second: float = Field(float("inf"), gt=0, exclude=True)
    """What one device sends to another; infinite where nobody said so. No part of a profile."""
    peak_flops_per_device: float | None = Field(None, gt=0, allow_inf_nan=False)
    """What a device could multiply in a second; None where nobody measured it."""
    fewer: Mapping[int, UnitTimes] = {}
    """By number of devices: the same while so many compute, where fewer devices have more threads
    each."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for kind in (*KINDS, *self.seconds):
            if not {op.value for op in Op} <= self.seconds.get(kind, {}).keys():
                raise ValueError(f"{kind}: expected times of all operations")
            if kind not in (*KINDS, ACTION):
                raise ValueError(f"{kind}: expected {', '.join(KINDS)} or {ACTION}")
        forward = [self.seconds[kind][Op.F.value] for kind in KINDS]
        if max(max(each.values()) for each in forward) < 1e-9:
            raise ValueError("F: expected a nanosecond or more, of some unit")
        return self

    def while_so_many_compute(self, devices: int) -> UnitTimes:
        """Return the times of the smallest number of devices that was measured and is enough."""
        enough = [number for number in self.fewer if number >= devices]
        if not enough:
            return self
        link = {"link_bytes_per_second": self.link_bytes_per_second}
        return self.fewer[min(enough)].model_copy(update=link)

    def of_action(self, op: Op, sequences: int) -> float:
        """Return the seconds of one action besides those of its units."""
        return self.of(ACTION, op, sequences) if ACTION in self.seconds else 0.0

    def of_part(self, part: Sequence[str], op: Op, sequences: int) -> float:
        """Return the seconds of one action with all units of a part."""
        units = (self.of(unit, op, sequences) for unit in part)
        return self.of_action(op, sequences) + sum(units)

    def of(self, unit: str, op: Op, sequences: int) -> float:
        """Return the seconds of one operation of one unit."""
        known = self.seconds[unit.partition(".")[0]][op.value]
        sizes = sorted(known)
        if len(sizes) == 1:  # no slope is known: in proportion, as counted FLOPs are
            return known[sizes[0]] * sequences / sizes[0]
        # The neighbours of `sequences`, or the two sizes at the nearer end.
        # Of 1, 2 and 4 measured: 3 lies between 2 and 4, and 8 on the same line beyond them.
        right = min(max(bisect_left(sizes, sequences), 1), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = (known[high] - known[low]) / (high - low)
        return max(0.0, known[low] + slope * (sequences - low))


def counted_times(config: RunConfig, flops_per_second: float) -> UnitTimes:
    """Return F = B = W = the unit's forward FLOPs over `flops_per_second`, with nothing fixed.

    A micro-batch then costs nothing by itself, so more of them always look better: only a profile
    sees what limits m.
    """
    # One sequence is enough: FLOPs are in proportion, and `of` takes a single size for just that.
    one = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_size": 1, "micro_batches": 1})}
    )
    flops = {
        cost.unit.partition(".")[0]: cost.forward_flops for cost in unit_costs(one.model, one.train)
    }
    return UnitTimes(
        source=f"counted, at an assumed {flops_per_second / 1e9:,.0f} GFLOP/s",
        seconds={
            # BW is B and W in one: twice a forward.
            kind: {
                op.value: {1: flops[kind] / flops_per_second * (2 if op is Op.BW else 1)}
                for op in Op
            }
            for kind in KINDS
        },
        peak_flops_per_device=flops_per_second,
    )
