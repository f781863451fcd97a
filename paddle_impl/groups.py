"""Who talks to whom: the processes of the run, and a process group for every pair of ranks and
direction that a schedule needs.

Differs: PyTorch and TensorFlow hand tensors from thread to thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor
from paddle.distributed.communication.group import Group

from common.runtime.executor import sent_by
from common.runtime.world import World
from common.schedule.action import Schedule
from common.spec.mesh import Mesh, Place


@dataclass(frozen=True)
class Joined:
    """What `ranks.join_pipeline` has joined: who this process is, and what each computes on."""

    world: World
    mesh: Mesh
    devices: tuple[str, ...]
    """Of every rank: "cpu", "gpu:0"."""

    @property
    def place(self) -> Place:
        return self.mesh.place(self.world.rank)

    @property
    def pipeline(self) -> list[int]:
        """The ranks of this process' own line."""
        return self.mesh.pipeline(self.mesh.line(self.world.rank))

    @property
    def through_host(self) -> bool:
        """Whether messages go through the host's memory (`paddle_impl.sockets`): between CPUs, and
        where ranks share a GPU.

        Differs: NCCL refuses two processes on one GPU. The others' stages are threads of one
        process, whose tensors stay where they are.
        """
        used = set(zip(self.world.hosts, self.devices, strict=True))
        return self.devices[0] == "cpu" or len(used) < self.world.size


joined: Joined | None = None


def here() -> Joined:
    """Return what this process has joined. Raises RuntimeError before it has."""
    if joined is None:
        raise RuntimeError("no pipeline yet; expected paddle_impl.ranks.join_pipeline before")
    return joined


one_way: dict[tuple[int, int], Group] = {}
"""By sender and receiver, the group that carries this direction's messages alone, once it is made.

On GPUs the two ranks of a group have a communicator, which does their sends and receives one after
another, and a send ends only with its receive. If one carried both directions, two neighbours that
both send first would wait for ever, as 1F1B has them (tests/common/test_nccl.py).
"""


def connect(schedule: Schedule) -> None:
    """Make the groups that the schedule's messages need; all ranks call it, with one schedule."""
    everybody = range(schedule.num_devices)
    _connect({(sender, to) for sender in everybody for _, to in sent_by(schedule, sender)})


def connect_ring(schedule: Schedule) -> None:
    """Make those of generation, whose logits go from the last virtual stage to the first."""
    holders = [holder for holder, _ in schedule.location]
    _connect(set(zip(holders, holders[1:] + holders[:1], strict=True)))


def _connect(pairs: set[tuple[int, int]]) -> None:
    """Make the groups of these (sender, receiver), devices of every line, that are not there yet.

    A communicator is made by the first message, and to make one, a rank waits for the other one's
    call. So that message is sent here: a sender in a pass does not wait. All ranks take the pairs
    in one order, those of other lines too, so they never wait in a circle.
    """
    mesh, own = here().mesh, here().world.rank
    for ranks in map(mesh.pipeline, range(mesh.lines)):
        # Where a V turns, a device sends to itself.
        needed = {(ranks[device], ranks[to]) for device, to in pairs if device != to}
        for sender, receiver in sorted(needed - one_way.keys()):
            group = one_way[sender, receiver] = paddle.distributed.new_group([sender, receiver])
            if own == sender:
                paddle.distributed.isend(paddle.zeros([1]), dst=receiver, group=group)
            elif own == receiver:
                paddle.distributed.recv(paddle.zeros([1]), src=sender, group=group)


def send(tensor: Tensor, device: int) -> None:
    """Hand a tensor to a device of this process' line, without waiting for it."""
    own, to = here().world.rank, here().pipeline[device]
    paddle.distributed.isend(tensor, dst=to, group=one_way[own, to])


def receive(tensor: Tensor, device: int) -> None:
    """Fill a tensor with what a device of this process' line sends."""
    own, sender = here().world.rank, here().pipeline[device]
    paddle.distributed.recv(tensor, src=sender, group=one_way[sender, own])


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """`common.runtime.engine.Engine.sum_over_ranks`, by Paddle's group of all ranks."""
    if here().world.size == 1:
        return list(values)
    # What the ranks add up, they hold in places of their own or in one rank alone, so that the
    # order of the additions, which on GPUs is NCCL's, changes no bit.
    together = paddle.to_tensor(list(values), "float64")
    paddle.distributed.all_reduce(together)
    sums: list[float] = together.tolist()
    return sums
