"""What all processes of a run must agree on, checked by one number from each of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec.mesh import Mesh

Sum = Callable[[Sequence[float]], list[float]]
"""`Engine.sum_over_ranks`."""


class Disagreement(RuntimeError):
    """Two processes of one run have different weights, or run different things."""


def digest_number(*contents: bytes) -> float:
    """Return 48 bits of a digest, as a number that a float64 holds exactly."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return float(int.from_bytes(digest.digest()[:6], "big"))


def gather(numbers: Sequence[float], rank: int, size: int, add: Sum) -> list[list[float]]:
    """Return every rank's `numbers`: each adds its own, in a row that is 0 everywhere else."""
    # A sum is the one collective that every framework has: where all others add 0, a sum is a copy.
    rows = np.zeros((size, len(numbers)))  # (ranks, numbers)
    rows[rank] = numbers
    summed: list[list[float]] = np.reshape(add(rows.ravel().tolist()), rows.shape).tolist()
    return summed


def clock_offset(hosts: Sequence[str], rank: int, add: Sum) -> float:
    """Return by how many seconds this process' clock is ahead of rank 0's: 0 on its host, where
    they have one clock. Every process calls it.

    One process of each host in turn enters a sum so late that the others have waited for it, and
    leave a message's time after it has entered. With a clock that is 5.0 ahead and messages of 0.1:

        rank 0     enters at 10.0 ──┐                             ┌──► leaves at 10.5
        this one                    └──► leaves at 15.1    enters at 15.4

    15.1 - 10.0 is the offset and a message, 10.5 - 15.4 a message less the offset: half their
    difference is the offset, whatever a message takes, if it takes as long both ways.
    """
    latecomers = [hosts.index(host) for host in dict.fromkeys(hosts)]
    own = latecomers.index(hosts.index(hosts[rank]))
    add([0.0])  # they may come as much apart as they started; they leave about together
    began = time.perf_counter()
    add([0.0])
    late_seconds = 2 * (time.perf_counter() - began) + 1e-3
    entered, left = [], []
    for late in latecomers:
        time.sleep(late_seconds if late == rank else 0.0)
        entered.append(time.perf_counter())
        add([0.0])
        left.append(time.perf_counter())
    times = np.reshape(gather([*entered, *left], rank, len(hosts), add), (len(hosts), 2, -1))
    (entered_0, left_0), (entered_own, left_own) = times[0], times[latecomers[own]]
    there, back = left_own[0] - entered_0[0], left_0[own] - entered_own[own]
    return float(there - back) / 2 if own else 0.0


def check_lines(
    mesh: Mesh, rank: int, weights: Mapping[str, NDArray[Any]], steps_done: int, add: Sum
) -> None:
    """Raise Disagreement, in every process, if two replicas or shards of a stage have different
    weights (`Engine.weights`: what is cut, joined; what is not, each shard's own).

    They started from the same and added up the same gradients, so a single other bit means that a
    gradient or an update went wrong on one of them.
    """
    # 48 bits of a digest travel through the same sum: a float64 holds whole numbers up to 2^53.
    own = digest_number(*(np.ascontiguousarray(array).tobytes() for array in weights.values()))
    digests = [row[0] for row in gather([own], rank, mesh.size, add)]
    for stage in range(mesh.stages):
        for line in range(1, mesh.lines):
            if digests[mesh.pipeline(line)[stage]] != digests[mesh.rank(stage, 0)]:
                raise Disagreement(
                    f"stage {stage}: after {steps_done} steps {mesh.line_name(line)} has other "
                    f"weights than {mesh.line_name(0)}; expected equal bits"
                )
