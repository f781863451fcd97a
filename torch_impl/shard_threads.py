"""The shards of one replica as threads of one process, which meet in its memory.

            stage 0                       stage 1
    line 0  thread: shard 0  ──────────►  thread: shard 0      a line is the training loop of a shard, with
                  ▲ sums                        ▲ sums         the threads and the channel of its stages
    line 1  thread: shard 1  ──────────►  thread: shard 1

What a shard hands to another one it leaves in a mailbox that all share, and takes theirs out of it.
Sums are in the order of the shards, so their bits are those of processes (`torch_impl.ranks`), which
several replicas and launchers have. The first failure of a thread, wherever it is, stops them all.

Differs: Paddle's shards are always processes; TensorFlow's are devices of one stage.
"""  # noqa: E501

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.runtime.cpus import threads_per_stage
from common.runtime.engine import Engine
from common.runtime.executor import described
from common.runtime.job import Job
from common.runtime.mode import Mode
from common.runtime.worker import run_job
from common.schedule.action import Schedule
from common.spec.run import RunConfig
from torch_impl import devices, streams
from torch_impl.gradients import added
from torch_impl.shard_engine import ShardEngine
from torch_impl.shards import Shards, columns_of
from torch_impl.stage import Channel

_Values = TypeVar("_Values")


def are_threads(config: RunConfig) -> bool:
    """Return whether the run's shards are threads of one process, where no launcher starts it."""
    return config.tensor_parallel > 1 and config.replicas == 1 and config.executor == "table"


def run_lines(job: Job, build_engine: Callable[[RunConfig], Engine]) -> None:
    """Run a job (`common.runtime.worker.run_job`): each line in a thread where its shards are
    threads. Raises the first failure of any.
    """
    if not are_threads(job.config):
        run_job(job, build_engine)
        return
    meeting = Meeting(job.config)

    def run_line(shard: int) -> None:
        try:
            run_job(job.of_line(shard), lambda config: ThreadEngine(config, shard, meeting))
        except Exception as error:
            meeting.stop(_of_shard(shard, error))

    shards = range(job.config.tensor_parallel)
    with ThreadPoolExecutor(len(shards), "shard") as lines:
        list(lines.map(run_line, shards))
    if meeting.failure is not None:
        raise meeting.failure


def _of_shard(shard: int, failure: BaseException) -> RuntimeError:
    """The failure with the shard's name: all of them have the same devices."""
    named = RuntimeError(f"shard {shard}: {described(failure)}")
    named.__cause__ = failure
    return named


class Meeting(Channel):
    """The mailbox of all shards. It numbers their devices as the mesh does its ranks (`common.spec.
    mesh`): stage x shards + shard.
    """

    def __init__(self, config: RunConfig) -> None:
        self.devices = devices.stage_devices(config.stages * config.tensor_parallel, config.device)
        super().__init__(self.devices, streams.copy_streams(self.devices))


class Address(NamedTuple):
    """Of what a thread hands to the one of another shard."""

    stage: int
    """-1 between the lines' own threads."""
    number: int
    sender: int
    receiver: int


@dataclass(frozen=True)
class ThreadShards(Shards):
    """What one thread knows of the others; `group` is the `Meeting`."""

    stage: int = -1
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def sum(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if self.count == 2:
            return added(self.exchanged([flat, flat])).view_as(x)
        # As processes do it: each adds up one slice for all.
        own = added(self.exchanged(flat.tensor_split(self.count)))
        return torch.cat(self.gathered(own)).view_as(x)

    def gathered(self, x: Any) -> list[Any]:
        return self.exchanged([x] * self.count)

    def exchanged(self, pieces: Sequence[Any]) -> list[Any]:
        """Hand every shard its piece, a tensor or what nobody changes any more; return what they
        all have for this one.
        """
        number, own, first = next(self._numbers), self.shard, self.stage * self.count
        others = [shard for shard in range(self.count) if shard != own]
        for other in others:
            address = Address(self.stage, number, own, other)
            self.group.send(address, pieces[other], first + other)
        found = {
            other: self.group.receive(Address(self.stage, number, other, own), first + own)
            for other in others
        }
        return [found.get(shard, pieces[own]) for shard in range(self.count)]


class ThreadEngine(ShardEngine):
    """One shard of all stages (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig, shard: int, meeting: Meeting) -> None:
        t, stages = config.tensor_parallel, range(config.stages)
        self._meeting = meeting
        self.shards: ThreadShards = ThreadShards(t, shard, columns_of(config), meeting)
        threads = threads_per_stage(config.stages * t, config.threads)
        self._build(config, tuple(stages), meeting.devices[shard::t], threads)
        # Autograd has one thread for all backwards on a GPU, where one that waits for another
        # shard's would wait for ever: now each is in the thread of its stage, as on the CPU.
        self._on_all(lambda d: torch.autograd.set_multithreading_enabled(False))

    def peak_memory_bytes(self) -> dict[int, int]:
        """As the protocol says; what several shards share is counted under the first of them."""
        every, t, shard = self._meeting.devices, self.shards.count, self.shards.shard
        firsts = [every.index(device) for device in every]
        peaks = super().peak_memory_bytes()
        return {d: peak for d, peak in peaks.items() if (n := d * t + shard) == firsts[n]}

    def _of_all(self, values: _Values) -> list[_Values]:
        return self.shards.gathered(values)

    def _shards_of(self, device: int) -> Shards:
        return replace(self.shards, stage=device)

    def _open_channel(self, schedule: Schedule, mode: Mode) -> Channel:
        channel = _LineChannel(self._torch_devices, self._copy_streams)
        channel.meeting, channel.shard = self._meeting, self.shards.shard
        return channel


class _LineChannel(Channel):
    """That of one line: what stops it stops them all."""

    meeting: Meeting
    shard: int

    def stop(self, failure: BaseException) -> None:
        super().stop(failure)
        self.meeting.stop(_of_shard(self.shard, failure))
