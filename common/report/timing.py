"""Where a run's step time went, and what the simulator makes of the costs that were measured in it.

One step of one stage, from the first action of any stage to the last:

    ├ host ┤ schedule wait │ communication wait ├ compute ┤ host ├ compute ┤ schedule wait ┤ then: rest (the optimizer)
           the sender has    its message is on             between           done before the
           not ended yet     the way or is read            two actions       others are

The five parts add up to the step's time, on every stage.
"""  # noqa: E501

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict

from common.runtime.job import EventRecord
from common.schedule.action import Op, Placement, Schedule, canonical, parse_action
from common.schedule.play import play
from common.schedule.simulate import Costs, Simulation
from common.schedule.table import OPS, Table, tabulate

Events = Mapping[int, Sequence[EventRecord]]
"""One step's actions by device."""


def _canonical(placement: Placement) -> Placement:
    return placement if isinstance(placement, str) else canonical(placement)


class ActionCost(BaseModel):
    """What an operation took on a virtual stage, in seconds."""

    model_config = ConfigDict(frozen=True)

    virtual_stage: int
    op: str
    seconds: float
    """The mean over a step's micro-batches; of that the median over the timed steps. A pipeline
    sums actions up, so within a step the mean counts; a step that the machine disturbed should not.
    """
    p10_seconds: float
    p90_seconds: float
    """Of single actions."""
    count: int


class StageTime(BaseModel):
    """A stage's mean step, in seconds; the parts add up to the mean step time."""

    model_config = ConfigDict(frozen=True)

    compute: float
    communication_wait: float
    """The sender had ended, but its message was not there yet."""
    schedule_wait: float
    """The sender had not ended; or this stage was done and others were not."""
    host: float
    """Between two actions, and before the first if it could have started."""
    rest: float
    """Outside the pipeline: norm, clipping, optimizer, batch in and loss out."""

    @property
    def total(self) -> float:
        return self.compute + self.communication_wait + self.schedule_wait + self.host + self.rest


class Timing(BaseModel):
    """One run, measured and simulated. Values are medians over the timed steps unless noted."""

    model_config = ConfigDict(frozen=True)

    costs: tuple[ActionCost, ...]
    hop_seconds: float
    """From the end of a sender to the start of a receiver that was waiting."""
    receive_seconds: float = 0.0
    """From ready to start where the message was there already."""
    placement: Annotated[Placement, AfterValidator(_canonical)]
    measured_pipeline_seconds: float
    """From the first action of any stage to the last."""
    simulated_pipeline_seconds: float
    """With every action taking its cost (`ActionCost.seconds`) and every message one hop."""
    replayed_pipeline_seconds: float
    """With every action taking the time it took in that very step, and every message one hop."""
    measured_bubble_fraction: float
    simulated_bubble_fraction: float
    measured_step_seconds: float
    simulated_step_seconds: float
    """The simulated pipeline and the median measured rest."""
    median_step: int
    """The timed step whose pipeline time is nearest to the median; its events are in the result."""
    stages: dict[int, StageTime]

    @property
    def step_difference(self) -> float:
        """Simulated over measured step time, less 1."""
        return self.simulated_step_seconds / self.measured_step_seconds - 1


@dataclass(frozen=True)
class _Step:
    """A step's times, row by row as in the schedule's table, in seconds from its first action."""

    table: Table
    # (n,): the end of the row before on the same device; for its first, the pipeline's begin, which
    # is when a device whose first action waits for no message is ready.
    previous_end: np.ndarray
    ready: np.ndarray  # (n,)
    start: np.ndarray  # (n,)
    end: np.ndarray  # (n,)

    @property
    def span(self) -> float:
        return float(self.end.max())

    @property
    def sender_end(self) -> np.ndarray:
        """(n,): the end of the row that sends the message; minus infinity where there is none."""
        return np.where(self.table.source >= 0, self.end[self.table.source], -np.inf)

    @property
    def waited(self) -> np.ndarray:
        """(n,): whether the row was ready before its sender had ended."""
        waited: np.ndarray = self.ready < self.sender_end
        return waited


def executed_schedule(
    events: Events, name: str, micro_batches: int, chunks: int, placement: Placement
) -> Schedule:
    """Return the schedule that the events amount to: two that overlap ran one after the other."""
    rows = tuple(
        tuple(parse_action(event.action) for event in events[device]) for device in sorted(events)
    )
    return Schedule(name, rows, micro_batches, chunks, placement)


def executed(schedule: Schedule, events: Events) -> Simulation:
    """Return one step's events as a simulation, in ms from its first action, to be drawn."""
    step = _step(tabulate(schedule), events)
    return Simulation(
        step.table, Costs.uniform(schedule.num_devices), step.start * 1e3, step.end * 1e3
    )


def simulated(schedule: Schedule, timing: Timing, transmission_seconds: float = 0.0) -> Simulation:
    """Return the same schedule with the run's median costs, in milliseconds; and behind a link that
    is busy with every message for so long (`Costs.transmission`).
    """
    table = tabulate(schedule)
    cost = {(c.virtual_stage, c.op): c.seconds for c in timing.costs}
    return _simulate(table, cost, timing.hop_seconds, 1e3, transmission_seconds)


def measure(
    steps: Sequence[Events], step_seconds: Sequence[float], schedule: Schedule, untimed_steps: int
) -> Timing | None:
    """Return the timing of a run from the events of all its steps; None if no step is timed or the
    events are not the schedule's.

    `step_seconds` is each whole step, with the optimizer. The first `untimed_steps` are left out.
    """
    timed = list(range(untimed_steps, len(steps)))
    devices = range(schedule.num_devices)
    wanted = {d: [str(action) for action in schedule.devices[d]] for d in devices}
    complete = all(
        {d: [event.action for event in done] for d, done in steps[i].items()} == wanted
        for i in timed
    )
    if not timed or not complete or not schedule.num_actions:
        return None
    table = tabulate(schedule)
    measured = [_step(table, steps[i]) for i in timed]
    seconds = [step_seconds[i] for i in timed]
    # From here on the model: each action at its stage's cost, each message one hop.
    costs = _costs(measured)
    hop = _hop_seconds(measured)
    model = _simulate(table, {(c.virtual_stage, c.op): c.seconds for c in costs}, hop, 1.0)
    spans = [step.span for step in measured]
    middle = statistics.median(spans)
    rest = statistics.median([whole - span for whole, span in zip(seconds, spans, strict=True)])
    busy = [float((step.end - step.start).sum()) for step in measured]
    hops = [hop] * table.num_rows
    return Timing(
        costs=costs,
        hop_seconds=hop,
        receive_seconds=_receive_seconds(measured),
        placement=schedule.placement,
        measured_pipeline_seconds=middle,
        simulated_pipeline_seconds=model.makespan,
        replayed_pipeline_seconds=statistics.median(
            max(play(table, (step.end - step.start).tolist(), hops).end) for step in measured
        ),
        measured_bubble_fraction=statistics.median(
            1 - b / (schedule.num_devices * span) for b, span in zip(busy, spans, strict=True)
        ),
        simulated_bubble_fraction=model.bubble_fraction,
        measured_step_seconds=statistics.median(seconds),
        simulated_step_seconds=model.makespan + rest,
        median_step=min(zip(timed, spans, strict=True), key=lambda pair: abs(pair[1] - middle))[0],
        stages={device: _stage_time(measured, seconds, device) for device in devices},
    )


def _step(table: Table, events: Events) -> _Step:
    flat = [event for device in sorted(events) for event in events[device]]
    names = ("ready_seconds", "start_seconds", "end_seconds")
    ready, start, end = (np.array([getattr(event, name) for event in flat]) for name in names)
    firsts = table.bounds[:-1]
    begin = ready[firsts[table.source[firsts] < 0]].min()
    ready, start, end = np.maximum(ready - begin, 0.0), start - begin, end - begin
    # Rows lie device by device, so the row before is that of the same device but for its first.
    previous = np.concatenate([[0.0], end[:-1]])  # (n,)
    previous[table.bounds[:-1]] = 0.0
    return _Step(table, previous, ready, start, end)


def _costs(steps: Sequence[_Step]) -> tuple[ActionCost, ...]:
    table = steps[0].table
    costs = []
    for k, op in sorted(set(zip(table.virtual_stage.tolist(), table.op.tolist(), strict=True))):
        # By virtual stage and not by device: the embedding's and the head's chunks cost otherwise.
        rows = (table.virtual_stage == k) & (table.op == op)
        # Mean within a step, median over steps: 30 ms in one disturbed step of ten move nothing.
        spent = np.array([(step.end - step.start)[rows] for step in steps])  # (steps, m)
        p10, p90 = np.percentile(spent, [10, 90]).tolist()
        costs.append(
            ActionCost(
                virtual_stage=k,
                op=OPS[op].value,
                seconds=float(np.median(spent.mean(axis=1))),
                p10_seconds=p10,
                p90_seconds=p90,
                count=spent.size,
            )
        )
    return tuple(costs)


def _hop_seconds(steps: Sequence[_Step]) -> float:
    """From a sender's end to a waiting receiver's start; 0 if none waited."""
    # A receiver may be off before its sender's clock has said that the sender ended.
    return _as_cost(np.maximum(step.start - step.sender_end, 0.0)[step.waited] for step in steps)


def _receive_seconds(steps: Sequence[_Step]) -> float:
    """From ready to start of those whose message was there; 0 if none was."""
    return _as_cost((step.start - step.ready)[step.table.receives & ~step.waited] for step in steps)


def _as_cost(seconds: Iterable[np.ndarray]) -> float:
    """Return the median over steps of each one's mean, as for `ActionCost`; 0 without any."""
    means = [float(of_step.mean()) for of_step in seconds if of_step.size]
    return statistics.median(means) if means else 0.0


def _simulate(
    table: Table,
    cost: Mapping[tuple[int, str], float],
    hop_seconds: float,
    unit: float,
    transmission_seconds: float = 0.0,
) -> Simulation:
    """Plays the table with a cost for each (virtual stage, operation); times are seconds x `unit`.

    Differs from `common.schedule.simulate` in the costs alone: there BW takes what B and W take,
    here what it has taken, and a schedule may have all three.
    """
    stages = table.virtual_stage.tolist()
    spent = [unit * cost[k, OPS[op].value] for k, op in zip(stages, table.op.tolist(), strict=True)]
    busy = (unit * transmission_seconds * table.messages).tolist()
    played = play(table, spent, [unit * hop_seconds] * table.num_rows, transmissions=busy)
    schedule = table.schedule

    def of_device(op: Op) -> tuple[float, ...]:
        return tuple(
            unit * sum(cost.get((k, op.value), 0.0) for k in parts) for parts in schedule.parts
        )

    whole = tuple(map(sum, zip(of_device(Op.B), of_device(Op.BW), strict=True)))
    costs = Costs(
        *(of_device(Op.F), whole, of_device(Op.W)),
        communication=(unit * hop_seconds,) * schedule.num_devices,
        transmission=(unit * transmission_seconds,) * schedule.num_devices,
    )
    return Simulation(table, costs, *map(np.array, (played.start, played.end, played.left)))


def _stage_time(steps: Sequence[_Step], seconds: Sequence[float], device: int) -> StageTime:
    """Means, not medians: those of the parts would not add up to that of the whole."""
    table = steps[0].table
    rows = slice(int(table.bounds[device]), int(table.bounds[device + 1]))
    parts = []
    for step, whole in zip(steps, seconds, strict=True):
        previous, ready, start, end = (
            a[rows] for a in (step.previous_end, step.ready, step.start, step.end)
        )
        # Where the wait splits: before, the sender was still computing; after, its message was on
        # the way. Ready at 2, sent at 5, begun at 6: 3 of schedule wait, 1 of communication wait.
        # A sender that had ended by 2 makes both ends meet at 2, and all of the wait is the way's.
        sent = np.clip(step.sender_end[rows], ready, start)
        # A thread that starts late loses nothing while its first message is still to come.
        in_time = float(np.clip(step.sender_end[rows][0], previous[0], ready[0]) - previous[0])
        schedule_wait = in_time + float((sent - ready).sum()) + step.span - float(end[-1])
        parts.append(
            [
                float((end - start).sum()),
                float((start - sent).sum()),
                schedule_wait,
                float((ready - previous).sum()) - in_time,
                whole - step.span,
            ]
        )
    means = np.mean(parts, axis=0).tolist()  # in the order of the fields  # (5,)
    return StageTime(**dict(zip(StageTime.model_fields, means, strict=True)))
