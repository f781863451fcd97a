"""How long a message takes by each framework's own way between two processes: one of the two.

    TF_CONFIG=... python -m tests.campaigns.transport torch 4096 1048576     (`hosts.py` starts it)

Rank 0 prints, as JSON, by size in bytes: half the time there and back (`latency`, the median), and
bytes per second with many on their way at once (`rate`).
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common.runtime import launchers
from common.runtime.meeting import Room
from common.runtime.text_store import TextStore
from common.runtime.world import World
from common.spec.run import RunConfig

MODULES = {"torch": "torch_impl", "tensorflow": "tf_impl", "paddle": "paddle_impl"}
Way = tuple[Callable[[Any], None], Callable[[Any], None], Callable[[int], Any]]
"""send, receive (into such a tensor), and a tensor of so many bytes."""


def measure(way: Way, rank: int, size: int, count: int) -> tuple[float, float]:
    send, receive, make = way
    tensor = make(size)

    def there_and_back() -> float:
        began = time.perf_counter()
        for does in (send, receive) if rank == 0 else (receive, send):
            does(tensor)
        return (time.perf_counter() - began) / 2

    latency = statistics.median(there_and_back() for _ in range(count))
    began = time.perf_counter()
    for _ in range(count):
        (send if rank == 0 else receive)(tensor)
    # The last word says that all have arrived.
    (receive if rank == 0 else send)(tensor)
    return latency, count * size / (time.perf_counter() - began - latency)


def main(framework: str, sizes: list[int]) -> None:
    ranks = importlib.import_module(f"{MODULES[framework]}.ranks").RANKS
    launched = launchers.find(os.environ)
    store = TextStore(launched, 100)
    world = World(
        launched.world.rank, launched.world.endpoints, Room(store, "", launched.world.rank, 2, 100)
    )
    config = RunConfig.model_validate(
        {"framework": framework, "stages": 2, "device": "cpu", "threads": 1}
    )
    ranks.join(world, config)
    way = importlib.import_module(f"tests.{framework}.transport").way(1 - world.rank)
    found = {}
    for size in sizes:
        count = int(np.clip(2**26 // size, 4, 100))
        measure(way, world.rank, size, 3)  # buffers, and a window that has opened
        found[size] = measure(way, world.rank, size, count)
    if world.rank == 0:
        print(json.dumps(found))
    ranks.wait_for_all(2)
    sys.stdout.flush()
    time.sleep(1)  # the store is rank 0's
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
