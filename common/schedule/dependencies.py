"""The only place that says what must have happened before what.

The validator, the simulator, the executor's tests and the search all ask here. A step is (operation, micro-batch,
virtual stage); k is a virtual stage, K their number, so k + 1 is the next part of the model:

    F(i, k)   needs F(i, k-1)                    its input
    B(i, k)   needs F(i, k) and B(i, k+1)        what it differentiates, and the gradient of its output
    W(i, k)   needs B(i, k)                      what B left for it
    BW(i, k)  is B(i, k) and W(i, k) at once, and gives what either gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.schedule.action import Op

NEEDS: dict[Op, tuple[tuple[Op, int], ...]] = {
    Op.F: ((Op.F, -1),),
    Op.B: ((Op.F, 0), (Op.B, +1)),
    Op.W: ((Op.B, 0),),
    Op.BW: ((Op.F, 0), (Op.B, +1)),
}
"""What an operation on virtual stage k needs: operations of the same micro-batch on virtual stage k + offset. At the two
ends of the model, where there is no such stage, nothing. "B" stands for whichever of B and BW the schedule has."""

GIVES: dict[Op, tuple[Op, ...]] = {Op.F: (Op.F,), Op.B: (Op.B,), Op.W: (Op.W,), Op.BW: (Op.B, Op.W)}
"""Whose results an action leaves behind."""

MESSAGE_OFFSET: dict[Op, int | None] = {Op.F: +1, Op.B: -1, Op.BW: -1, Op.W: None}
"""Where a result goes: F hands its output to the next virtual stage, B its input gradient back; W keeps all."""


@dataclass(frozen=True, slots=True)
class Step:
    """An action seen from the model: the virtual stage instead of device and chunk."""

    op: Op
    micro_batch: int
    virtual_stage: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.micro_batch}@{self.virtual_stage}"


def dependencies(step: Step, num_virtual_stages: int) -> tuple[Step, ...]:
    """The steps that must end before `step` starts. "B" stands for whichever of B and BW the schedule has."""
    needed = ((op, step.virtual_stage + offset) for op, offset in NEEDS[step.op])
    return tuple(Step(op, step.micro_batch, k) for op, k in needed if 0 <= k < num_virtual_stages)


def sends_to(step: Step, num_virtual_stages: int) -> int | None:
    """The virtual stage that gets the step's result, if any."""
    offset = MESSAGE_OFFSET[step.op]
    if offset is None or not 0 <= step.virtual_stage + offset < num_virtual_stages:
        return None
    return step.virtual_stage + offset
