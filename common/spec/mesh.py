"""Who computes what in a run of several processes: a mesh with axes (stage, replica, shard).

With 2 replicas of 3 stages, six processes, in the order of their ranks:

    rank   0          1          2          3          4          5
           stage 0    stage 0    stage 1    stage 1    stage 2    stage 2
           replica 0  replica 1  replica 0  replica 1  replica 0  replica 1

The replicas of a stage are neighbours, since they add up gradients as large as their weights once a
step, while two stages pass each other activations, which are smaller and can wait. Launchers number
the processes of a host one after another, so the gradients stay on the fast links within a host
(torchtitan, Megatron and DeepSpeed order their meshes the same way). Measured on two hosts over
1 Gbit/s: 531 to 567 ms a step this way, 675 to 695 with the axes exchanged.

The shards of a stage (`common.spec.shards`), which exchange sums several times a block, are the
closest neighbours: rank = (stage x replicas + replica) x shards + shard. A *line* is one process of
every stage, with the same replica and shard: what a process sends to the next stage stays in it.
Line = replica x shards + shard, and the results of line 0 count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.spec.run import RunConfig


class Place(NamedTuple):
    """The coordinates of one process."""

    stage: int
    replica: int
    shard: int = 0


@dataclass(frozen=True)
class Mesh:
    """`replicas` pipelines (d) of `stages` (p), each cut into `shards` (t): a process for each."""

    stages: int
    replicas: int
    shards: int = 1

    @classmethod
    def of(cls, config: RunConfig) -> Mesh:
        """Return the processes of a run that has one for every stage, or PyTorch's threads that
        stand for them.

        TensorFlow's shards are devices of one process: its mesh has no third axis. So are the
        replicas of its baseline, MirroredStrategy.
        """
        # Its mesh is of processes: shards that are devices of one are no part of it.
        if config.framework != "tensorflow":
            return cls(config.stages, config.replicas, config.tensor_parallel)
        return cls(config.stages, 1 if config.executor == "plain" else config.replicas)

    @property
    def lines(self) -> int:
        return self.replicas * self.shards

    @property
    def size(self) -> int:
        return self.stages * self.lines

    def place(self, rank: int) -> Place:
        # Digits of one number: with 3 stages, 2 replicas and 2 shards, rank 7 is stage 1 (7 // 4),
        # line 3, which is replica 1, shard 1.
        stage, line = divmod(rank, self.lines)
        return Place(stage, *divmod(line, self.shards))

    def rank(self, stage: int, replica: int, shard: int = 0) -> int:
        return (stage * self.replicas + replica) * self.shards + shard

    def line(self, rank: int) -> int:
        return rank % self.lines

    def axis(self, a: int, b: int) -> str:
        """Return along which axis two ranks differ: `stages`, else `replicas`, else `shards`."""
        # The first that differs: two neighbours along one axis have the other coordinates in
        # common, but for a tied head, whose ends are stages apart.
        axes = zip(("stages", "replicas", "shards"), self.place(a), self.place(b), strict=True)
        return next(axis for axis, x, y in axes if x != y)

    def pipeline(self, line: int) -> list[int]:
        """Return the ranks of one line, in the order of its stages."""
        return [stage * self.lines + line for stage in range(self.stages)]

    def name(self, rank: int) -> str:
        """Return what messages call a process: `stage 1`, or `stage 1 of replica 0`, and with
        several shards `stage 1 of replica 0, shard 1`.
        """
        stage, replica, shard = self.place(rank)
        of_replica = f" of replica {replica}" if self.replicas > 1 else ""
        return f"stage {stage}{of_replica}" + (f", shard {shard}" if self.shards > 1 else "")

    def line_name(self, line: int) -> str:
        """Return what messages call a line: `replica 0`, `shard 1`, or `replica 0 shard 1`."""
        replica, shard = divmod(line, self.shards)
        of_shard = [f"shard {shard}"] if self.shards > 1 else []
        return " ".join([f"replica {replica}"] * (self.replicas > 1 or not of_shard) + of_shard)

    def copies(self, stage: int, shard: int = 0) -> list[int]:
        """Return the ranks that hold the same shard of a stage, in the order of the replicas."""
        return [self.rank(stage, replica, shard) for replica in range(self.replicas)]

    def shard_group(self, stage: int, replica: int) -> list[int]:
        """Return the ranks that share the matrices of a stage, in the order of the shards."""
        return [self.rank(stage, replica, shard) for shard in range(self.shards)]

    def describe(self, hosts: Sequence[str]) -> list[str]:
        """Return a line for each host that says what it computes, such as `host-a: replica 0
        stages 0-1, replica 1 stages 0-1`; `hosts` has the host of every rank.
        """
        lines = []
        for host in dict.fromkeys(hosts):
            own = [rank for rank in range(self.size) if hosts[rank] == host]
            by_line = {
                line: [self.place(rank).stage for rank in own if self.line(rank) == line]
                for line in sorted(map(self.line, own))
            }
            words = [f"{self.line_name(n)} {_ranges(stages)}" for n, stages in by_line.items()]
            lines.append(f"{host}: {', '.join(words)}")
        return lines


def _ranges(numbers: Sequence[int]) -> str:
    """`stages 0-1`, `stage 3` or `stages 0-1+4`: neighbours are drawn together."""
    runs = [
        [n for _, n in group]
        for _, group in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])
    ]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"stage{'s' * (len(numbers) > 1)} {'+'.join(words)}"
