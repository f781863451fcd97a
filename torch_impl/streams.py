"""The streams of GPUs: one or two for the computing of each stage's thread, two for the copies
between two GPUs.

Differs: TensorFlow manages its streams itself. Paddle takes another one for all but its products,
which stay on the first (docs/frameworks.md). So there a pair is F, then BW.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from common.schedule.action import Action, Op

CopyStreams = Mapping[
    tuple[torch.device, torch.device], tuple[torch.cuda.Stream, torch.cuda.Stream]
]


def copy_streams(devices: Sequence[torch.device]) -> CopyStreams:
    """By sender and receiver, a stream on each of two GPUs: a copy waits for nothing else."""
    # Each direction has its own pair: two stages that send to each other would wait otherwise.
    gpus = {device for device in devices if device.type == "cuda"}
    return {(a, b): (torch.cuda.Stream(a), torch.cuda.Stream(b)) for a, b in permutations(gpus, 2)}


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the calling thread its share of the cores and, on CUDA, a stream of its own.

    Both settings belong to the thread. The GPU's default stream stays idle: a copy between GPUs
    waits for the current stream of its destination, and must not wait for that stage's computing.
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


def streams_of(actions: Sequence[Action]) -> dict[tuple[int, int], int]:
    """Return on which of a device's two streams, 0 or 1, each (micro-batch, chunk) is computed.

    Autograd runs a backward where its forward ran, and memory belongs to the stream that asked for
    it. So a stream is chosen once for F, B and W: for the F of a pair the one that the pair's BW,
    whose F came earlier, does not have.

        F0       F1       (F2&BW0)   (F3&BW1)   (F4&BW2)   BW3 ...
        0        0        F2: 1      F3: 1      F4: 0
    """
    found: dict[tuple[int, int], int] = {}
    for action, after in zip(actions, [*actions[1:], None], strict=True):
        if action.op is Op.F:
            beside = after is not None and after.overlaps
            found[action.micro_batch, action.chunk] = (
                1 - found[after.micro_batch, after.chunk] if after and beside else 0
            )
    return found


class PairedStreams:
    """The two streams of a stage whose schedule has pairs, `(F2&BW0)`: both halves start when all
    before them is done, and what follows waits for both. Other actions run alone.

    A pair's halves share only what neither writes: weights, tokens and targets.
    """

    def __init__(
        self, device: torch.device, actions: Sequence[Action], direct: Iterable[Tensor]
    ) -> None:
        """In the thread of the stage, whose own stream is the first of the two. `direct` are the
        parameters whose gradients autograd gives.
        """
        self._main, self._side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        self._of = streams_of(actions)
        # A backward that gives a parameter's gradient waits for the stream where autograd first met
        # the parameter. If the other half of a pair were there, it would wait for that too.
        with torch.cuda.stream(torch.cuda.Stream(device)):
            self._first_met = [get_gradient_edge(parameter) for parameter in direct]
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")

    def enter(self, action: Action) -> None:
        """Make the stream of `action` the thread's, ahead of it."""
        main, side = self._main, self._side
        if not action.overlaps:
            main.wait_stream(side)
            side.wait_stream(main)
        torch.cuda.set_stream((main, side)[self._of[action.micro_batch, action.chunk]])

    def leave(self) -> None:
        """After the pass: the thread has its own stream again, which waits for the other."""
        torch.cuda.set_stream(self._main)
        self._main.wait_stream(self._side)
