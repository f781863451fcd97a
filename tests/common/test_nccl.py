"""Which layout of NCCL communicators a schedule's messages get through: the executor's own order,
played by NCCL's rules.

On a GPU a communicator does its sends and receives one after another, in the order in which the
host queued them, and a send ends only when its receive runs on the other side. So two devices that
both send first wait for ever, if one communicator carries both directions. A receive is queued when
the device asks for the message; a sender's earlier messages, which carry no address, come first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from common.runtime.executor import Message, run_stage
from common.schedule.action import Schedule, ScheduleError
from common.schedule.generators import GENERATORS, default_chunks, make_schedule

Layout = Callable[[int, int], Any]
"""From sender and receiver to the communicator that carries their messages."""


def per_direction(sender: int, receiver: int) -> Any:
    return sender, receiver


def per_pair(sender: int, receiver: int) -> Any:
    return frozenset((sender, receiver))


class Call(NamedTuple):
    """What a device asks of a communicator."""

    message: Message
    sender: int
    receiver: int
    after: int
    """Actions of the device that end before."""


class Recorder:
    """A channel that writes down what `run_stage` asks of it; with `coming`, receives are in the
    order of the sends.
    """

    def __init__(self, device: int, coming: dict[int, list[Message]] | None = None) -> None:
        self.device, self.calls, self.actions = device, list[Call](), -1
        self.coming = {sender: deque(messages) for sender, messages in (coming or {}).items()}
        self.needs: dict[int, Message] = {}
        self._arrived: set[Message] = set()

    def before(self, action: object) -> None:
        self.actions += 1

    def send(self, message: Message, tensor: object, device: int) -> None:
        if device != self.device:
            self.calls.append(Call(message, self.device, device, self.actions + 1))

    def receive(self, message: Message, device: int) -> None:
        if device == self.device:
            return
        self.needs[self.actions] = message
        while self.coming and message not in self._arrived:
            self._arrived.add(coming := self.coming[device].popleft())
            self.calls.append(Call(coming, device, self.device, self.actions))


def record(schedule: Schedule) -> list[Recorder]:
    """What every device asks for, by the executor's own walk over a stage that computes nothing."""
    nothing = SimpleNamespace(
        **dict.fromkeys(("forward", "backward", "backward_input", "backward_weight"), lambda *_: 0)
    )

    def walk(device: int, coming: dict[int, list[Message]] | None = None) -> Recorder:
        recorder = Recorder(device, coming)
        run_stage(schedule, device, nothing, recorder, recorder.before)
        return recorder

    everybody = range(schedule.num_devices)
    sent = [walk(device).calls for device in everybody]
    return [
        walk(d, {s: [call.message for call in sent[s] if call.receiver == d] for s in everybody})
        for d in everybody
    ]


def stuck(schedule: Schedule, layout: Layout) -> list[str]:
    """The actions that are never done, one per device that is stuck."""
    recorders = record(schedule)
    streams: dict[tuple[int, Any], deque[Call]] = {}
    for recorder in recorders:
        for call in recorder.calls:
            streams.setdefault(
                (recorder.device, layout(call.sender, call.receiver)), deque()
            ).append(call)
    done, arrived = [0] * schedule.num_devices, [set[Message]() for _ in recorders]

    def head(device: int, communicator: Any) -> Call | None:
        queue = streams.get((device, communicator))
        return queue[0] if queue and queue[0].after <= done[device] else None

    moved = True
    while moved:
        moved = False
        for d, recorder in enumerate(recorders):
            while done[d] <= recorder.actions and recorder.needs.get(done[d]) in (
                None,
                *arrived[d],
            ):
                done[d], moved = done[d] + 1, True
        for device, communicator in streams:
            sent = head(device, communicator)
            if sent is None or sent.sender != device:
                continue
            received = head(sent.receiver, communicator)
            if received is not None and received.message == sent.message:
                streams[device, communicator].popleft()
                streams[sent.receiver, communicator].popleft()
                arrived[sent.receiver].add(sent.message)
                moved = True
    lines = zip(schedule.devices, done, strict=True)
    return [f"{d}: {line[count]}" for d, (line, count) in enumerate(lines) if count < len(line)]


def schedules(name: str) -> list[Schedule]:
    """Some of every shape that the schedule takes."""
    found = []
    for p, m in ((2, 3), (2, 8), (3, 6), (4, 4), (4, 9), (8, 16)):
        try:
            found.append(make_schedule(name, p, m, default_chunks(name)))
        except ScheduleError:
            continue  # interleaved wants a multiple of p
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("name", GENERATORS)
def test_no_schedule_hangs_with_a_communicator_per_direction(name: str) -> None:
    for schedule in schedules(name):
        assert stuck(schedule, per_direction) == [], schedule


@pytest.mark.parametrize("name", GENERATORS)
def test_with_one_communicator_per_pair_only_those_pass_whose_neighbours_never_send_at_once(
    name: str,
) -> None:
    """So Paddle's channel has one group for each direction."""
    hanging = [schedule for schedule in schedules(name) if stuck(schedule, per_pair)]
    assert bool(hanging) == (name not in ("naive", "gpipe")), name


def test_two_devices_that_both_send_first_are_stuck_in_what_follows() -> None:
    """The case by hand: in 1F1B device 0 sends F1 while device 1 sends the gradient of micro-batch
    0.
    """
    schedule = make_schedule("1f1b", 2, 2)
    assert stuck(schedule, per_pair) == ["0: BW0", "1: F1"]
