"""The only place that says what must have happened before what.

The validator, the simulator, the executor and the hang report all ask here. A step is (operation,
micro-batch i, virtual stage k); k + 1 is the next part of the model:

    [1] F(i, k)   needs F(i, k-1)                its input
    [2] B(i, k)   needs F(i, k) and B(i, k+1)    what it differentiates, and its output's gradient
    [3] W(i, k)   needs B(i, k)                  what B left for it
    [4] BW(i, k)  is B(i, k) and W(i, k) at once: it needs what B needs and gives what both give

    k = 0      F(i, 0) ────────► B(i, 0) ──► W(i, 0)
                  │                 ▲
                  ▼                 │            down: activations, up: gradients
    k = 1      F(i, 1) ────────► B(i, 1) ──► W(i, 1)
"""

from __future__ import annotations

from dataclasses import dataclass

from common.schedule.action import Op

NEEDS: dict[Op, tuple[tuple[Op, int], ...]] = {
    Op.F: ((Op.F, -1),),  # [1]
    Op.B: ((Op.F, 0), (Op.B, +1)),  # [2]
    Op.W: ((Op.B, 0),),  # [3]
    Op.BW: ((Op.F, 0), (Op.B, +1)),  # [4]
}
"""What an operation on virtual stage k needs: (operation, offset), of the same micro-batch on
virtual stage k + offset; nothing where the model has no such stage. "B" means whichever of B and BW
the schedule has."""

GIVES: dict[Op, tuple[Op, ...]] = {Op.F: (Op.F,), Op.B: (Op.B,), Op.W: (Op.W,), Op.BW: (Op.B, Op.W)}
"""The operations whose results an action leaves behind."""

MESSAGE_OFFSET: dict[Op, int | None] = {Op.F: +1, Op.B: -1, Op.BW: -1, Op.W: None}
"""Where a result goes: F's to the next virtual stage, B's to the one before; W's stays."""


@dataclass(frozen=True, slots=True)
class Step:
    """An action seen from the model: the virtual stage instead of device and chunk."""

    op: Op
    micro_batch: int
    virtual_stage: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.micro_batch}@{self.virtual_stage}"


def dependencies(step: Step, num_virtual_stages: int) -> tuple[Step, ...]:
    """Return the steps that must end before `step` starts, as in `NEEDS`."""
    needed = ((op, step.virtual_stage + offset) for op, offset in NEEDS[step.op])
    return tuple(Step(op, step.micro_batch, k) for op, k in needed if 0 <= k < num_virtual_stages)


def sends_to(step: Step, num_virtual_stages: int) -> int | None:
    """Return the virtual stage that gets the step's result; None if it stays."""
    offset = MESSAGE_OFFSET[step.op]
    # The last F ends in the loss, and the first B in the tokens, which have no gradient.
    if offset is None or not 0 <= step.virtual_stage + offset < num_virtual_stages:
        return None
    return step.virtual_stage + offset
