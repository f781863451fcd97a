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
    i, k = step.micro_batch, step.virtual_stage
    match step.op:
        case Op.F:
            return (Step(Op.F, i, k - 1),) if k > 0 else ()
        case Op.B | Op.BW:
            own = Step(Op.F, i, k)
            return (own, Step(Op.B, i, k + 1)) if k < num_virtual_stages - 1 else (own,)
        case Op.W:
            return (Step(Op.B, i, k),)


def sends_to(step: Step, num_virtual_stages: int) -> int | None:
    """The virtual stage that gets the step's result: F hands its output on, B its input gradient back; W keeps all."""
    match step.op:
        case Op.F:
            return step.virtual_stage + 1 if step.virtual_stage < num_virtual_stages - 1 else None
        case Op.B | Op.BW:
            return step.virtual_stage - 1 if step.virtual_stage > 0 else None
        case Op.W:
            return None
