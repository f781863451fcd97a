"""Decoding: sequences grow token by token, and every stage keeps their keys and values.

A group is what a micro-batch is in training: some sequences of one length that go through the
stages together. Its next token is known only once the last stage has finished with the former one,
so a pipeline with one group works on one stage at a time. With several groups it need not be empty
between two tokens: the stages form a ring, and a group's next token enters it as soon as its former
one has come round, behind the other groups.

    device 0   A1 B1 A2 B2 A3 B3           A, B groups; 1, 2, 3 tokens
    device 1      A1 B1 A2 B2 A3 B3        6 tokens in 7 slots; emptied after every token, in 9

So `run_decoding` walks the forwards of a schedule again and again, until every group has ended. T
tokens of m groups on p devices take max(m, p) T + min(m, p) - 1 slots, and (m + p - 1) T if the
pipeline is emptied after each: for 64 tokens on 4 devices 1.73 times as many with 4 groups, 1.37
times with 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.runtime.executor import Message, StageFailure
from common.schedule.action import Action, Schedule

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class Extension:
    """New tokens of a group: the same number for each of its sequences."""

    tokens: NDArray[np.int64]  # (b, t)
    rows: tuple[int, ...] | None
    """For every sequence the one of the group's last call that it goes on from (b,), so that they
    may end, part and change places. None: from nothing; positions count from 0.
    """


Feed = Callable[[int, NDArray[np.float64] | None], Extension | None]
"""(group, logits (b, V) after the last token of each sequence) -> what follows, None at the end.

The first call of a group has no logits. All calls are made where the embedding is.
"""


class Stage(Protocol[Tensor]):
    """The model chunks of one device, with a cache for every group."""

    def extend(self, group: int, chunk: int, extension: Extension, x: Tensor | None) -> Tensor:
        """Run the chunk on the new positions `x` (b, t, D), or on the new tokens if that is None.

        Returns (b, t, D), or behind the head the logits (b, V) of the last position.
        """


class Channel(Protocol[Tensor]):
    """As `common.runtime.executor.Channel`, with a word ahead of every tensor."""

    def tell(self, message: Message, extension: Extension | None, device: int) -> None:
        """Say what comes under this address; None: nothing, the group has ended."""

    def hear(self, message: Message, device: int) -> Extension | None: ...

    def send(self, message: Message, tensor: Tensor, device: int) -> None: ...

    def receive(self, message: Message, device: int) -> Tensor: ...


def run_decoding(
    schedule: Schedule,
    device: int,
    stage: Stage[Any],
    channel: Channel[Any],
    feed: Callable[[int, Any], Extension | None],
    before: Callable[[Action], None],
) -> None:
    """Walk the device's line of `schedule`, which has forwards alone, until all groups have ended.

    `feed` is a `Feed` of the framework's own logits; `before` is called ahead of every action.
    Raises StageFailure, with the original error as its cause.
    """
    count = schedule.num_virtual_stages
    line = schedule.devices[device]
    # What is still on its way through here, (group, chunk): an end passes all devices like a token.
    going = {(action.micro_batch, action.chunk) for action in line}
    begun: set[int] = set()
    while going:
        for action in line:
            i, chunk = action.micro_batch, action.chunk
            if (i, chunk) not in going:
                continue
            k = schedule.virtual_stage(device, chunk)
            try:
                before(action)
                extension = x = None
                if k > 0 or i in begun:  # behind the last virtual stage, -1, comes the first
                    message, sender = Message("activation", i, k), schedule.location[k - 1][0]
                    extension = channel.hear(message, sender)
                    if extension is not None:
                        x = channel.receive(message, sender)
                if k == 0:
                    begun.add(i)
                    extension, x = feed(i, x), None  # the activation that came round: logits
                to = (k + 1) % count
                message, receiver = Message("activation", i, to), schedule.location[to][0]
                if extension is None:
                    going.remove((i, chunk))
                    if to > 0:
                        channel.tell(message, None, receiver)
                    continue
                y = stage.extend(i, chunk, extension, x)
                channel.tell(message, extension, receiver)
                channel.send(message, y, receiver)
            except Exception as error:
                raise StageFailure(device, action, error) from error
