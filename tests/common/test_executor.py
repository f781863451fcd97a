"""The executor with integers for tensors: order, messages, what a failure says."""

from __future__ import annotations

import threading
from collections import defaultdict
from queue import SimpleQueue
from typing import Any

import pytest

from common.runtime.executor import Event, Message, StageFailure, run_stage
from common.schedule.action import Schedule, parse_schedule
from common.schedule.generators import GENERATORS, make_schedule

INPUT = 100


class Adder:
    """A chunk that adds its virtual stage's number; its gradient counts the stages above it."""

    def __init__(self, schedule: Schedule, device: int) -> None:
        self.schedule, self.device = schedule, device
        self.held: dict[tuple[int, int], int] = {}
        self.late: dict[tuple[int, int], int] = {}
        self.losses: dict[int, int] = {}
        self.weight_gradient = 0

    def forward(self, micro_batch: int, chunk: int, x: int | None) -> int | None:
        k = self.schedule.virtual_stage(self.device, chunk)
        self.held[micro_batch, chunk] = y = (INPUT * micro_batch if x is None else x) + k
        if k == self.schedule.num_virtual_stages - 1:
            self.losses[micro_batch] = y
            return None
        return y

    def backward_input(self, micro_batch: int, chunk: int, gradient: int | None) -> int | None:
        del self.held[micro_batch, chunk]
        self.late[micro_batch, chunk] = given = 1 if gradient is None else gradient + 1
        return None if self.schedule.virtual_stage(self.device, chunk) == 0 else given

    def backward_weight(self, micro_batch: int, chunk: int) -> None:
        self.weight_gradient += self.late.pop((micro_batch, chunk))

    def backward(self, micro_batch: int, chunk: int, gradient: int | None) -> int | None:
        result = self.backward_input(micro_batch, chunk, gradient)
        self.backward_weight(micro_batch, chunk)
        return result


class Mailboxes:
    def __init__(self) -> None:
        self.boxes: dict[Message, SimpleQueue[int]] = defaultdict(SimpleQueue)
        self.lock = threading.Lock()

    def box(self, message: Message) -> SimpleQueue[int]:
        with self.lock:
            return self.boxes[message]

    def send(self, message: Message, tensor: int, device: int) -> None:
        self.box(message).put(tensor)

    def receive(self, message: Message, device: int) -> int:
        return self.box(message).get()


def run(schedule: Schedule) -> tuple[list[Adder], dict[int, list[Event]]]:
    stages, channel = [Adder(schedule, d) for d in range(schedule.num_devices)], Mailboxes()
    events: dict[int, list[Event]] = {}

    def work(device: int) -> None:
        events[device] = run_stage(schedule, device, stages[device], channel)

    threads = [threading.Thread(target=work, args=(d,)) for d in range(schedule.num_devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stages, events


SPLIT = """# schedule: split micro_batches=2
0: F0 F1 B0 W0 B1 W1
1: F0 B0 F1 B1 W0 W1
"""
VEE = """# schedule: vee micro_batches=2 chunks=2 placement=vee
0: F0 F1 F0.1 BW0.1 F1.1 BW1.1 BW0 BW1
1: F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1
"""
LOOP = """# schedule: loop micro_batches=2 chunks=2 placement=loop
0: F0 F1 F0.1 F1.1 BW0.1 BW1.1 BW0 BW1
1: F0 F1 F0.1 BW0.1 F1.1 BW1.1 BW0 BW1
"""
PAIRS = """# schedule: pairs micro_batches=3
0: F0 F1 (F2&BW0) BW1 BW2
1: F0 (F1&BW0) (F2&BW1) BW2
"""
OWN = """# schedule: own micro_batches=2
placement: 0 1 4 | 2 3 5
0: F0 F0.1 F1 F1.1 F0.2 F1.2 BW0.2 BW1.2 BW0.1 BW0 BW1.1 BW1
1: F0 F0.1 F1 F1.1 F0.2 BW0.2 F1.2 BW1.2 BW0.1 BW0 BW1.1 BW1
"""
ALL = [
    make_schedule(name, p, m)
    for name in ("naive", "gpipe", "1f1b")
    for p in (1, 2, 4)
    for m in (1, 5)
]


@pytest.mark.parametrize(
    "schedule", [*ALL, *map(parse_schedule, (SPLIT, VEE, LOOP, PAIRS, OWN))], ids=lambda s: s.name
)
def test_every_schedule_computes_the_same(schedule: Schedule) -> None:
    assert set(GENERATORS) >= {"naive", "gpipe", "1f1b"}
    stages, events = run(schedule)
    total = schedule.num_virtual_stages
    losses = {i: loss for stage in stages for i, loss in stage.losses.items()}
    assert losses == {i: INPUT * i + sum(range(total)) for i in range(schedule.num_micro_batches)}
    assert (
        sum(stage.weight_gradient for stage in stages)
        == schedule.num_micro_batches * total * (total + 1) // 2
    )
    assert not any(stage.held or stage.late for stage in stages)
    for device, actions in enumerate(schedule.devices):
        assert [event.action for event in events[device]] == list(actions)
        for event in events[device]:
            assert event.ready_seconds <= event.start_seconds <= event.end_seconds


def test_times_are_those_of_the_clock_and_are_read_after_the_last_action() -> None:
    class Queue:
        """A device that has begun nothing before all is queued: its k-th mark lies k + 0.5 seconds
        later.
        """

        marks = 0

        def mark(self) -> int:
            self.marks += 1
            return self.marks - 1

        def seconds(self, mark: int) -> float:
            assert self.marks == 2 * len(schedule.devices[0])  # no input is waited for
            return mark + 0.5

    schedule = make_schedule("gpipe", 1, 2)
    events = run_stage(schedule, 0, Adder(schedule, 0), Mailboxes(), clock=Queue())
    assert [(event.ready_seconds, event.start_seconds, event.end_seconds) for event in events] == [
        (k + 0.5, k + 0.5, k + 1.5) for k in range(0, 8, 2)
    ]


def test_a_failure_names_device_and_action() -> None:
    class Broken(Adder):
        def backward(self, micro_batch: int, chunk: int, gradient: Any) -> Any:
            raise FloatingPointError("not finite")

    schedule = make_schedule("gpipe", 1, 2)
    with pytest.raises(StageFailure, match="device 0, action BW0: FloatingPointError: not finite"):
        run_stage(schedule, 0, Broken(schedule, 0), Mailboxes())
