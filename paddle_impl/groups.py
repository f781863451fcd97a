"""Who talks to whom: a process group for every pair of ranks and direction that a schedule needs.

Differs: PyTorch and TensorFlow hand tensors from thread to thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle.distributed.communication.group import Group

from common.runtime.executor import Message
from common.schedule.action import Op, Schedule
from common.schedule.dependencies import Step, sends_to


def through_host(used: Sequence[str]) -> bool:
    """Return whether messages go through the host's memory (`paddle_impl.sockets`): between CPUs,
    and where stages share a GPU.

    Differs: NCCL refuses two processes on one GPU. The others' stages are threads of one process,
    whose tensors stay where they are.
    """
    return used[0] == "cpu" or len(set(used)) < len(used)


one_way: dict[tuple[int, int], Group] = {}
"""By sender and receiver, the group that carries this direction's messages alone, once it is made.

On GPUs the two ranks of a group have a communicator, which does their sends and receives one after
another, and a send ends only with its receive. If one carried both directions, two neighbours that
both send first would wait for ever, as 1F1B has them (tests/common/test_nccl.py).
"""


def connect(schedule: Schedule, device: int) -> None:
    """Make the groups that the schedule's messages need; all ranks call it, with one schedule."""
    everybody = range(schedule.num_devices)
    _connect({(sender, to) for sender in everybody for _, to in sent_by(schedule, sender)}, device)


def connect_ring(schedule: Schedule, device: int) -> None:
    """Make those of generation, whose logits go from the last virtual stage to the first."""
    holders = [holder for holder, _ in schedule.location]
    _connect(set(zip(holders, holders[1:] + holders[:1], strict=True)), device)


def _connect(pairs: set[tuple[int, int]], device: int) -> None:
    """Make the groups of these (sender, receiver) that are not there yet.

    A communicator is made by the first message, and to make one, a rank waits for the other one's
    call. So that message is sent here: a sender in a pass does not wait. All ranks take the pairs
    in one order, so they never wait in a circle.
    """
    for sender, receiver in sorted(pairs - one_way.keys()):
        if sender == receiver:  # where a V turns
            continue
        group = one_way[sender, receiver] = paddle.distributed.new_group([sender, receiver])
        if device == sender:
            paddle.distributed.isend(paddle.zeros([1]), dst=receiver, group=group)
        elif device == receiver:
            paddle.distributed.recv(paddle.zeros([1]), src=sender, group=group)


def sent_by(schedule: Schedule, device: int) -> list[tuple[Message, int]]:
    """Return what `device` sends, in its order, each with the receiving device."""
    sent = []
    for action in schedule.devices[device]:
        step = Step(action.op, action.micro_batch, schedule.virtual_stage(device, action.chunk))
        to = sends_to(step, schedule.num_virtual_stages)
        if to is not None:
            message = Message(
                "activation" if action.op is Op.F else "gradient", action.micro_batch, to
            )
            sent.append((message, schedule.location[to][0]))
    return sent
