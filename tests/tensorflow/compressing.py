"""Three replicas as processes that add up compressed gradients: `python -m
tests.tensorflow.compressing FOLDER` (`tests.compression`).
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from common.runtime.ranks import _free_endpoints
from common.runtime.world import World
from common.spec.run import RunConfig
from tests.compression import REPLICAS, TENSORS, Arrays, Sum, config, exchange, start_ranks
from tf_impl import devices

SENT = {"CollectiveAllToAllV2": True, "CollectiveGatherV2": False}
"""Whether each other rank is sent its share alone, and not the whole."""


def summing(ranks: Any, configuration: RunConfig) -> Sum:
    import tensorflow as tf

    from tf_impl.compression import Compressor
    from tf_impl.weights import NamedParameter, to_array

    train, size = configuration.train, configuration.replicas
    named = [
        NamedParameter(t.name, tf.Variable(tf.zeros(t.shape, train.dtype)), t.is_copy)
        for t in TENSORS
    ]
    compressor, group = Compressor(configuration, named), ranks.group(range(size))
    gradients = [tf.Variable(tf.zeros(t.shape, train.dtype)) for t in TENSORS]
    call = type(group)._call

    def add(given: Any) -> tuple[Arrays, int]:
        sent = 0

        def counted(operation: str, rows: tf.Tensor) -> tf.Tensor:
            nonlocal sent
            length = int(tf.size(rows)) * rows.dtype.size
            sent += (size - 1) * (length // size if SENT[operation] else length)
            return call(group, operation, rows)

        group._call = counted
        for tensor, gradient in zip(TENSORS, gradients, strict=True):
            gradient.assign(given[tensor.key])
        with ThreadPoolExecutor(1) as waiting:
            compressor.start(gradients, group, waiting).finish()
        found = {t.key: to_array(g) for t, g in zip(TENSORS, gradients, strict=True)}
        return found, sent

    return add


def _rank(endpoints: tuple[str, ...], folder: Path, rank: int) -> None:
    from tf_impl import ranks

    size = len(endpoints)
    ranks._join(World(rank, endpoints), config("tensorflow", "none", "float32", size))
    exchange("tensorflow", rank, folder, partial(summing, ranks._joined))
    ranks._wait_for_all(size)


def main(folder: Path) -> int:
    devices.choose_kernels()
    import tf_impl.rank_engine  # noqa: F401  the ranks inherit it

    endpoints = tuple(_free_endpoints(max(REPLICAS)))
    return start_ranks(len(endpoints), partial(_rank, endpoints, folder))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
