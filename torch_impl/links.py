"""Messages between stages in different processes, over torch.distributed's point-to-point calls.

Nobody waits for a receiver: a send is queued and its tensor kept until it is out. A receive is
posted ahead of its use, so that the transfer runs during the computing before it. On one edge all
messages come in the order in which the sender's line of the schedule makes them, which the receiver
knows too, so it posts them in that order and keeps what comes before it is asked for:

    device 0 sends    F0  F1  F2  ...         device 1 asks for    F0  F1 (BW0) F2 ...
                      └───┴───┴── one edge, one order ──┴───┴────────────┘

Each tensor travels behind a header with its pass and address. A schedule that sends in another
order than its receiver expects is then an error that says so, and not a wrong number.

NCCL joins calls of one communicator in one queue, and two neighbours that both send first would
wait for each other for ever. So every directed edge has a communicator of its own there
(`directed_groups`); gloo needs none.

Differs: TensorFlow's messages go through `tf_impl`'s own links, Paddle's through fleet's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from common.runtime.executor import Message, sent_by
from common.schedule.action import Schedule
from torch_impl.stage import Channel

AHEAD = {"cpu": 8, "cuda": 2}
"""Receives posted on an edge before they are asked for. Gloo lets a message leave when it knows
that its receiver waits; over a slow link that word takes as long as a message, or queues behind
some. Over fast ones 1, 2, 4 and 8 took the same time, and a GPU has no memory to waste."""

Edges = Mapping[tuple[int, int], Any]
"""The process group of each directed edge (from, to); empty where the default group will do."""


class Coming(NamedTuple):
    """A message on its way here."""

    message: Message
    header: Tensor  # (4,)
    tensor: Tensor  # (b, S, D)
    works: tuple[Any, ...]


def directed_groups(schedule: Schedule, ranks: Sequence[int]) -> dict[tuple[int, int], Any]:
    """Make a process group for every directed edge of one pipeline, whose stages have these ranks.

    Every process of the run calls it for every pipeline, in the same order.
    """
    edges = sorted({(a, b) for a in range(len(ranks)) for _, b in sent_by(schedule, a) if a != b})
    return {(a, b): distributed.new_group([ranks[a], ranks[b]]) for a, b in edges}


class LinkedChannel(Channel):
    """Carries one pass between this process' stage and those of others."""

    def __init__(
        self,
        schedule: Schedule,
        own: int,
        ranks: Sequence[int],
        edges: Edges,
        number: int,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`number` is the pass', the same on all ranks; `shapes` has that of every micro-batch's
        activation, (b, S, D).
        """
        super().__init__([device] * len(ranks), {})
        self._own, self._ranks, self._edges, self._number = own, ranks, edges, number
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._expected = {
            other: deque(m for m, to in sent_by(schedule, other) if to == own)
            for other in range(len(ranks))
            if other != own
        }
        self._coming: dict[int, deque[Coming]] = {other: deque() for other in self._expected}
        self._early: dict[Message, Tensor] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        for other in self._expected:
            self._post(other)

    def send(self, message: Message, tensor: Tensor, device: int) -> None:
        if device == self._own:  # where a V turns
            super().send(message, tensor, device)
            return
        group = self._edges.get((self._own, device))
        for part in (self._header(message), tensor.contiguous()):
            work = distributed.isend(part, self._ranks[device], group=group)
            self._leaving.append((work, part))
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()

    def receive(self, message: Message, device: int) -> Tensor:
        """Raises RuntimeError if another message comes in its place, or none will come."""
        if device == self._own:
            return super().receive(message, device)
        while message not in self._early:
            self._post(device)
            if not self._coming[device]:
                raise RuntimeError(f"device {device} sends no {message} in this pass")
            coming = self._coming[device].popleft()
            for work in coming.works:
                work.wait()
            if not torch.equal(coming.header, self._header(coming.message)):
                raise RuntimeError(
                    f"device {device} sent the message {coming.header.tolist()}; expected "
                    f"{self._header(coming.message).tolist()}, the {coming.message} (pass, kind, "
                    "micro-batch, virtual stage)"
                )
            self._early[coming.message] = coming.tensor
            self._post(device)
        return self._early.pop(message)

    def finish(self) -> None:
        """Wait until everything that was sent is out."""
        while self._leaving:
            self._leaving.popleft()[0].wait()

    def _post(self, other: int) -> None:
        """Receives the next messages of an edge, up to so many."""
        expected, coming = self._expected[other], self._coming[other]
        group = self._edges.get((other, self._own))
        while expected and len(coming) < AHEAD[self._device.type]:
            message = expected.popleft()
            header = torch.empty(4, dtype=torch.int64, device=self._device)
            shape = list(self._shapes[message.micro_batch])
            tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
            works = tuple(
                distributed.irecv(part, self._ranks[other], group=group)
                for part in (header, tensor)
            )
            coming.append(Coming(message, header, tensor, works))

    def _header(self, message: Message) -> Tensor:
        kind = ("activation", "gradient").index(message.kind)
        numbers = [self._number, kind, message.micro_batch, message.virtual_stage]
        return torch.tensor(numbers, device=self._device)
