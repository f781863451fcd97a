"""The one executor: walk one device's list of actions, in any framework and for any schedule.

    device 0   F0 ──► F1 ──► ........ BW0 ──► BW1         every arrow to the right is the order of the list,
                │      │              ▲       ▲           every message between the lines a `Channel` call:
                ▼      ▼              │       │           F sends an activation to the next virtual stage,
    device 1    ...... F0 ──► BW0 ────┘ F1 ──► BW1        B (or BW) a gradient to the one before

A `Stage` computes in its framework's own tensors, a `Channel` moves them; this loop does neither.
For every action of the list, `run_stage` does four things:

    [1] watch      tell whoever watches what comes next
    [2] receive    wait for the input, if another virtual stage makes it
    [3] compute    F, B, W or BW
    [4] send       pass the result on, if another virtual stage needs it

F, B, W and BW are called F, I, W and B in torch.distributed.pipelining.
"""  # noqa: E501

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from common.schedule.action import Action, Op, Schedule
from common.schedule.dependencies import Step, sends_to

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class Message:
    """The address of a tensor in transit: its kind, its micro-batch, its virtual stage."""

    kind: Literal["activation", "gradient", "word"]
    micro_batch: int
    virtual_stage: int

    def __str__(self) -> str:
        return (
            f"{self.kind} of micro-batch {self.micro_batch} into virtual stage {self.virtual_stage}"
        )


def sent_by(schedule: Schedule, device: int) -> list[tuple[Message, int]]:
    """Return what `device` sends in one pass, in order, each with the receiving device."""
    sent = []
    for action in schedule.devices[device]:
        step = Step(action.op, action.micro_batch, schedule.virtual_stage(device, action.chunk))
        to = sends_to(step, schedule.num_virtual_stages)
        if to is not None:
            forward = action.op is Op.F
            message = Message("activation" if forward else "gradient", action.micro_batch, to)
            sent.append((message, schedule.location[to][0]))
    return sent


@dataclass(frozen=True, slots=True)
class Event:
    """One executed action, in times of the monotonic clock, which a machine's processes share."""

    action: Action
    ready_seconds: float  # the previous action had ended and this one began to wait for its input
    start_seconds: float  # the input was there
    end_seconds: float


class Clock(Protocol):
    """Says when: at once on a CPU; for queued work, when the pass has ended."""

    def mark(self) -> Any:
        """Now, in the order of the device's work."""

    def seconds(self, mark: Any) -> float:
        """When that was, in seconds of the monotonic clock; may wait until the device is there."""


class HostClock:
    """For devices whose work is done when a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


def unwatched(device: int, action: Action | None) -> None:
    """Do nothing: an `Engine.on_action` for engines that nobody watches."""


class Stage(Protocol[Tensor]):
    """The model chunks of one device. Inputs and gradients are None at the ends of the model."""

    def forward(self, micro_batch: int, chunk: int, x: Tensor | None) -> Tensor | None:
        """Run the chunk, keep what its backward needs; the last virtual stage keeps its loss."""

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        """B and W at once: add to the weights' gradients, return the input's; None for tokens."""

    def backward_input(
        self, micro_batch: int, chunk: int, gradient: Tensor | None
    ) -> Tensor | None:
        """Return the input's gradient alone, and keep what `backward_weight` needs."""

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        """Add the weight gradients to those of the earlier micro-batches."""


class Channel(Protocol[Tensor]):
    """Moves tensors between devices. A send never waits for its receiver: else a deadlock."""

    def send(self, message: Message, tensor: Tensor, device: int) -> None:
        """Hand `tensor` to `device`, which may be the sender itself (where a V turns)."""

    def receive(self, message: Message, device: int) -> Tensor:
        """Wait for the tensor that `device` sends or has sent under this address."""


def described(error: BaseException) -> str:
    """Return its type and its text; a MemoryError, for one, has none."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


class StageFailure(RuntimeError):
    """An action failed. The text says which, on which device; the cause is the original error."""

    def __init__(self, device: int, action: Action, error: Exception) -> None:
        super().__init__(f"device {device}, action {action}: {described(error)}")


def run_stage(
    schedule: Schedule,
    device: int,
    stage: Stage[Any],
    channel: Channel[Any],
    before: Callable[[Action], None] = lambda action: None,
    clock: Clock | None = None,
) -> list[Event]:
    """Execute `schedule.devices[device]` in order; return one event per action, timed by `clock`.

    `before` is called ahead of every action: progress and injected faults hook into it. Raises
    StageFailure, with the original error as its cause.
    """
    # With interleaving a device holds several pieces of the model. On 2 devices with 2 chunks,
    # virtual stage k lies on device k % 2, and stage 1 (device 1, chunk 0) sends its activations to
    # stage 2 (device 0, chunk 1). Only the ends of the model, 0 and `last`, have one neighbour.
    last = schedule.num_virtual_stages - 1
    clock = clock or HostClock()
    marks: list[tuple[Action, Any, Any, Any]] = []
    for action in schedule.devices[device]:
        # The list names device and chunk; inputs and outputs depend on the part of the model.
        k = schedule.virtual_stage(device, action.chunk)
        i, chunk = action.micro_batch, action.chunk
        try:
            before(action)  # [1]
            ready = clock.mark()
            # [2] Both stay so where the model begins (F) or ends (B), and for W.
            received, start = None, ready
            if action.op is Op.F and k > 0:
                received = channel.receive(Message("activation", i, k), schedule.location[k - 1][0])
            elif action.op in (Op.B, Op.BW) and k < last:
                received = channel.receive(Message("gradient", i, k), schedule.location[k + 1][0])
            if received is not None:
                start = clock.mark()
            match action.op:  # [3]
                case Op.F:
                    result = stage.forward(i, chunk, received)
                case Op.B:
                    result = stage.backward_input(i, chunk, received)
                case Op.BW:
                    result = stage.backward(i, chunk, received)
                case Op.W:
                    stage.backward_weight(i, chunk)
                    result = None
            to = sends_to(Step(action.op, i, k), last + 1)  # [4]
            if to is not None:
                message = Message("activation" if action.op is Op.F else "gradient", i, to)
                channel.send(message, result, schedule.location[to][0])
            del received, result  # else this frame keeps an activation alive in the next wait
            marks.append((action, ready, start, clock.mark()))
        except Exception as error:
            raise StageFailure(device, action, error) from error
    # Only now are marks turned into times: asking a GPU for one earlier would wait for its queue.
    events: list[Event] = []
    for action, *when in marks:
        times = [clock.seconds(mark) for mark in when]
        if action.overlaps:  # counts from where the other half ended: no time is anybody's twice
            times = [max(time, events[-1].end_seconds) for time in times]
        events.append(Event(action, *times))
    return events
