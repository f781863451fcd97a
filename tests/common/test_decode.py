"""The ring of stages, with stages that count slots instead of computing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from common.runtime.decode import Extension, run_decoding
from common.runtime.executor import Message, StageFailure
from common.runtime.mailbox import Mailbox, PipelineStopped
from common.schedule.generators import make_schedule

TOKEN = Extension(np.zeros((1, 1), np.int64), None)


class Post(Mailbox):
    def send(self, message: Message, tensor: Any, device: int) -> None:
        self.put(message, tensor)

    def receive(self, message: Message, device: int) -> Any:
        return self.take(message)


class Ring:
    """Devices that take one slot for every action; a tensor is the slot in which it was made."""

    def __init__(self, schedule: str, devices: int, groups: int, chunks: int = 1) -> None:
        self.schedule = make_schedule(schedule, devices, groups, chunks).only_forward()
        self.now = [0] * devices
        self.fed = [0] * groups
        self.came: dict[int, int] = {}

    def decode(self, tokens: list[int], fails: int = -1) -> int:
        """Return the slots until every group has its number of tokens, from now on."""
        start = max(self.now)
        self.now, self.fed, self.came = [start] * len(self.now), [0] * len(self.fed), {}
        post, count = Post(), len(self.now)

        def feed(group: int, came: int | None) -> Extension | None:
            self.came[group] = start if came is None else came
            self.fed[group] += 1
            return TOKEN if self.fed[group] <= tokens[group] else None

        def walk(d: int) -> BaseException | None:
            try:
                run_decoding(self.schedule, d, Stage(self, d, fails), post, feed, lambda a: None)
            except Exception as error:
                post.stop(error)
                return error.__cause__
            return None

        with ThreadPoolExecutor(count) as threads:
            self.errors = list(threads.map(walk, range(count)))
        if post.failure is not None:
            raise post.failure
        return max(self.now) - start


class Stage:
    def __init__(self, ring: Ring, device: int, fails: int) -> None:
        self.ring, self.device, self.fails = ring, device, fails

    def extend(self, group: int, chunk: int, extension: Extension, x: int | None) -> int:
        if self.device == self.fails and group == 1:
            raise ValueError("broken")
        now = self.ring.now
        now[self.device] = 1 + max(now[self.device], self.ring.came[group] if x is None else x)
        return now[self.device]


@pytest.mark.parametrize(
    ("devices", "groups"), [(1, 1), (2, 1), (2, 2), (2, 5), (4, 2), (4, 4), (4, 8)]
)
def test_the_next_token_enters_before_the_pipeline_is_empty(devices: int, groups: int) -> None:
    count = 64
    slots = Ring("gpipe", devices, groups).decode([count] * groups)
    assert slots == max(devices, groups) * count + min(devices, groups) - 1
    emptied = Ring("gpipe", devices, groups)
    assert sum(emptied.decode([1] * groups) for _ in range(count)) == (devices + groups - 1) * count
    if devices == 4 and groups >= 4:
        ratio = (devices + groups - 1) * count / slots
        assert ratio == pytest.approx({4: 1.73, 8: 1.37}[groups], abs=0.005)


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("1f1b", 1), ("naive", 1), ("interleaved", 2), ("zb-v", 2)]
)
def test_groups_end_at_different_times_in_any_schedule(schedule: str, chunks: int) -> None:
    ring, tokens = Ring(schedule, 2, 4, chunks), [3, 0, 7, 1]
    assert ring.decode(tokens) <= 4 * chunks * sum(tokens)
    assert ring.fed == [count + 1 for count in tokens]


def test_a_stage_that_fails_ends_the_others() -> None:
    ring = Ring("gpipe", 3, 2)
    with pytest.raises(StageFailure, match="device 1, action F1: ValueError: broken"):
        ring.decode([9, 9], fails=1)
    assert [type(error) for error in ring.errors] == [PipelineStopped, ValueError, PipelineStopped]
