"""The clock of a GPU, with events that end when the test says so."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import paddle
import pytest

from common.runtime.executor import HostClock
from common.schedule.action import Action, parse_action
from paddle_impl import clock


class Event:
    made: ClassVar[list[Event]] = []
    done: ClassVar[set[Event]] = set()

    def __init__(self, enable_timing: bool = False) -> None:
        self.event_base = SimpleNamespace(elapsed_time=None)
        Event.made.append(self)

    def record(self) -> None: ...

    def query(self) -> bool:
        return self in Event.done

    def elapsed_time(self, other: Event) -> float:
        assert other in Event.done
        return 1000.0 * Event.made.index(other)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "Event", Event)
    monkeypatch.setattr(clock, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(paddle.device, "synchronize", lambda: None)
    Event.made, Event.done = [], set()


def test_a_thread_notes_the_action_that_the_gpu_is_at_while_the_host_waits() -> None:
    noted: list[str] = []

    def note(action: Action) -> None:
        noted.append(str(action))

    def go_on() -> None:
        while noted[-1] != "F0":
            time.sleep(0.001)
        Event.done = set(Event.made[:-1])
        while noted[-1] != "BW0":
            time.sleep(0.001)
        Event.done = set(Event.made)

    one = clock.StreamClock(note)
    with clock.followed(one, note) as before:
        for text in ("F0", "F1", "BW0"):  # the host queues all of them at once
            before(parse_action(text))
            one.mark()  # ready
            last = one.mark()  # its end, where the next one begins
        gpu = threading.Thread(target=go_on)
        gpu.start()
        seconds = one.seconds(last)  # ends only because F0 and BW0 were noted again
    gpu.join()
    assert seconds > one.seconds(Event.made[1])


def test_on_a_cpu_the_host_says_when() -> None:
    def note(action: Action) -> None: ...

    found = clock.device_clock(note)
    assert isinstance(found, HostClock)
    with clock.followed(found, note) as before:
        assert before is note
