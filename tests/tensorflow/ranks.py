"""Two stages as processes that predict: `python -m tests.tensorflow.ranks FOLDER` leaves what each
of them has predicted in `FOLDER/<rank>.npy`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.runtime.job import Job
from common.runtime.ranks import _free_endpoints
from common.runtime.training import starting_weights
from common.runtime.world import World
from common.spec.run import RunConfig
from tests.compression import start_ranks
from tests.engines import small
from tf_impl import devices

TOKENS: Any = np.random.default_rng(0).integers(0, 256, (6, 9))


def config() -> RunConfig:
    return small("tensorflow", 2, "zb-v", run={"chunks": 2})


def main(folder: Path) -> int:
    devices.choose_kernels()
    import tf_impl.rank_engine  # noqa: F401  the ranks inherit it

    endpoints = tuple(_free_endpoints(2))
    return start_ranks(2, partial(_rank, endpoints, folder))


def _rank(endpoints: tuple[str, ...], folder: Path, rank: int) -> None:
    from tf_impl import ranks

    engine = ranks._join(World(rank, endpoints), config())(config())
    engine.reset(starting_weights(Job(config=config(), out="", noise=0.1)))
    np.save(folder / f"{rank}.npy", engine.predict(TOKENS))
    ranks._wait_for_all(2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
