"""The textbook's formulas for a pipeline, beside what the simulator says of this very schedule.

With t_i = F + B + W of stage i, n micro-batches and p stages:

    step             sum of t_i + (n - 1) x the largest t_i
    speed-up         sum of t_i / (largest + (sum - largest) / n)
    busy share       n / (n + p - 1)
    idle time        p (p - 1) (F + B + W), of all devices together

They are for schedules in which a backward follows its forward's way (gpipe, 1f1b), for messages
that take no time; the last two for equal stages, too. Where a schedule overlaps more (interleaved,
zero bubble) or less (naive), they are wrong, and the comparison says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.schedule.simulate import Simulation


@dataclass(frozen=True)
class Compared:
    """A formula with its numbers, and the simulator's."""

    name: str
    formula: str
    value: float
    simulated: float

    @property
    def verdict(self) -> str:
        difference = self.value - self.simulated
        if abs(difference) <= 1e-9 * max(abs(self.simulated), 1.0):
            return "holds"
        return f"off by {difference:+.4g}"


def textbook(simulation: Simulation) -> list[Compared]:
    """Return every formula for this schedule's sizes and costs. A stage is a device."""
    p, n = simulation.schedule.num_devices, simulation.schedule.num_micro_batches
    # With recomputation a backward has the forward's time in it, and so has t_i.
    stage = [float(busy) / n for busy in simulation.busy]  # t_i, what a run spends on a micro-batch
    whole, largest = sum(stage), max(stage)
    idle = p * simulation.makespan - float(simulation.busy.sum())
    return [
        Compared("step", "sum t + (n-1) max t", whole + (n - 1) * largest, simulation.makespan),
        Compared(
            "speed-up",
            "sum t / (max t + (sum t - max t)/n)",
            whole / (largest + (whole - largest) / n),
            n * whole / simulation.makespan,
        ),
        Compared("busy share", "n / (n+p-1)", n / (n + p - 1), 1 - simulation.bubble_fraction),
        Compared("idle time", "p (p-1) (tf + tb)", p * (p - 1) * whole / p, idle),
    ]
