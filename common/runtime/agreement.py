"""What all processes of a run must agree on, checked by one number from each of them."""

from __future__ import annotations

import hashlib
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
    rows = np.zeros((size, len(numbers)))
    rows[rank] = numbers
    summed: list[list[float]] = np.reshape(add(rows.ravel().tolist()), rows.shape).tolist()
    return summed


def check_replicas(
    mesh: Mesh, rank: int, weights: Mapping[str, NDArray[Any]], steps_done: int, add: Sum
) -> None:
    """Raise Disagreement, in every process, if two replicas of a stage have different weights.

    They started from the same and added up the same gradients, so a single other bit means that a
    gradient or an update went wrong on one of them.
    """
    own = digest_number(*(np.ascontiguousarray(array).tobytes() for array in weights.values()))
    digests = [row[0] for row in gather([own], rank, mesh.size, add)]
    for stage in range(mesh.stages):
        for replica, other in enumerate(mesh.copies(stage)):
            if digests[other] != digests[mesh.rank(stage, 0)]:
                raise Disagreement(
                    f"stage {stage}: after {steps_done} steps replica {replica} has other weights "
                    "than replica 0; expected equal bits"
                )
