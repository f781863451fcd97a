"""Two stages as processes that predict: `python -m tests.tensorflow.ranks FOLDER` leaves what each
of them has predicted in `FOLDER/<rank>.npy`.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.runtime.job import Job
from common.runtime.ranks import _free_endpoints
from common.runtime.training import starting_weights
from common.runtime.world import World
from common.spec.run import RunConfig
from tests.engines import small
from tf_impl import devices

TOKENS: Any = np.random.default_rng(0).integers(0, 256, (6, 9))


def config() -> RunConfig:
    return small("tensorflow", 2, "zb-v", run={"chunks": 2})


def main(folder: Path) -> int:
    devices.choose_kernels()
    import tf_impl.rank_engine  # noqa: F401  the ranks inherit it

    endpoints = tuple(_free_endpoints(2))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(World(r, endpoints), folder)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


def _rank(world: World, folder: Path) -> None:
    from tf_impl import ranks

    engine = ranks._join(world, config())(config())
    engine.reset(starting_weights(Job(config=config(), out="", noise=0.1)))
    np.save(folder / f"{world.rank}.npy", engine.predict(TOKENS))
    ranks._wait_for_all(world.size)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
