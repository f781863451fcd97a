"""The streams of GPUs: one for the computing of each stage's thread, two for the copies between two
GPUs.

Differs: TensorFlow and Paddle manage their streams themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch

CopyStreams = Mapping[
    tuple[torch.device, torch.device], tuple[torch.cuda.Stream, torch.cuda.Stream]
]


def copy_streams(devices: Sequence[torch.device]) -> CopyStreams:
    """By sender and receiver, a stream on each of two GPUs: a copy waits for no computing and for
    no other copy.
    """
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
