"""What an action costs the host beside its kernels: python -m tests.campaigns.fake_gpu host_path

Stages of the preset `tiny` with CUDA graphs share one GPU that does nothing, and whose kernels are
empty: a replay is one launch. What is left is the executor, the clock, the messages and the launch.
Prints a table of counts, which are the same in every run, and of CPU time, which is not.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch
from torch import Tensor

from tests.engines import batch, small
from torch_impl import devices

STEPS = 100
CASES = (
    ("1f1b", 1, 1),
    ("1f1b", 2, 1),
    ("1f1b", 4, 1),
    ("zb-h1", 4, 1),
    ("interleaved", 4, 2),
)
"""Schedule, stages, chunks."""

fake = ctypes.CDLL(None)
counts = (ctypes.c_long * 5).in_dll(fake, "fake_counts")
"""Of kernels, copies, fills, events and waits for one."""


class EmptyGraph:
    """In the place of `torch.cuda.CUDAGraph`: records nothing, and replays it with one launch."""

    def capture_begin(self, **options: Any) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None:
        stream = torch.cuda.current_stream()
        at = ctypes.c_int(stream.device_index), ctypes.c_void_p(stream.cuda_stream)
        fake.fake_queue(*at, None, ctypes.c_long(0))


def empty(stage: Any) -> None:
    """Let a stage compute nothing."""

    def result(micro_batch: int, chunk: int, given: Tensor | None = None) -> Tensor:
        return torch.empty(2, 16, 32, device=stage.device)  # (b, S, D)

    stage.forward = stage.backward = stage.backward_input = stage.backward_weight = result
    stage.losses = list


def measure(schedule: str, stages: int, chunks: int) -> str:
    """Return a row of the table."""
    from torch_impl.engine import PipelineEngine

    run = {"device": "cuda", "chunks": chunks}
    long = {"batch_size": 8, "micro_batches": 8}
    engine = PipelineEngine(small("torch", stages, schedule, num_layers=8, train=long, run=run))
    for stage in engine.stages.values():
        empty(stage)
    given, spent = batch(engine), [0.0, 0.0]
    seen: list[list[int]] = [[], []]
    for now, steps in enumerate((3, STEPS)):  # first an eager pass, one that records, a replay
        for _ in range(steps):
            engine.forward_backward(given)
        spent[now] = sum(engine._on_all(lambda device: time.thread_time()))
        seen[now] = list(counts)
    engine.close()
    actions = sum(map(len, engine.schedule.devices))
    each = [(b - a) / STEPS / actions for a, b in zip(*seen, strict=True)]
    microseconds = 1e6 * (spent[1] - spent[0]) / STEPS / actions
    launches, copies, _, events, waits = (f"{count:.2f}" for count in each)
    cells = (schedule, stages, chunks, actions, launches, copies, events, waits)
    return " | ".join(map(str, ("", *cells, f"{microseconds:.0f}", ""))).strip()


if __name__ == "__main__":
    devices.configure(1, 1, "cuda")
    torch.cuda.CUDAGraph, torch.cuda.device_count = EmptyGraph, lambda: 1
    print("| schedule | p | v | actions | launches | copies | events | waits | CPU time, µs |")
    print("| --- |" + " ---: |" * 8)
    for case in CASES:
        print(measure(*case), flush=True)
