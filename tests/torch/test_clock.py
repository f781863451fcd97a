"""The clock of GPU streams, with events that end when the test says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from common.schedule.action import Action, parse_action
from torch_impl.clock import StreamClock

DONE: list[Any] = []
"""What the GPU has got to, in order."""


class Event:
    made: ClassVar[list[Event]] = []

    def __init__(self, **options: bool) -> None:
        assert options == {"enable_timing": True, "blocking": True}
        Event.made.append(self)

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None:
        DONE[:] = Event.made

    def query(self) -> bool:
        return self in DONE

    def elapsed_time(self, other: Event) -> float:
        assert other in DONE
        return 1000.0 * Event.made.index(other)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None)
    )
    Event.made, DONE[:] = [], []
    return []


def test_a_hang_has_the_name_of_the_action_that_the_gpu_is_at(noted: list[str]) -> None:
    def note(action: Action) -> None:
        noted.append(str(action))

    clock = StreamClock(note)
    clock.note_again()
    assert noted == []
    for text in ("F0", "F1", "BW0", "BW1"):  # the host queues all of them at once
        clock.begin(parse_action(text))
        clock.mark()  # ready
        clock.mark()  # its end, where the next one begins
    begun = Event.made[::2]
    for reached, expected in ((0, ["F0"]), (0, []), (1, ["F1"]), (3, ["BW1"]), (3, [])):
        DONE[:] = Event.made[: Event.made.index(begun[reached]) + 1]
        noted.clear()
        clock.note_again()
        assert noted == expected


def test_times_wait_for_the_last_mark(noted: list[str]) -> None:
    clock = StreamClock(lambda action: None)
    marks = [clock.mark(), clock.mark()]
    first, second = map(clock.seconds, marks)
    assert second - first == pytest.approx(1.0)
