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
from common.runtime.executor import Message
from common.runtime.meeting import Room
from common.runtime.text_store import TextStore
from common.runtime.world import World
from common.spec.run import RunConfig

MODULES = {"torch": "torch_impl", "tensorflow": "tf_impl", "paddle": "paddle_impl"}
Way = tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[int], Any]]
"""send, receive (into such a tensor), and a tensor of so many bytes."""


def torch_way(other: int) -> Way:
    import torch
    from torch import distributed

    sent: list[Any] = []

    def send(tensor: Any) -> None:
        sent.append((distributed.isend(tensor, other), tensor))
        while sent and sent[0][0].is_completed():
            sent.pop(0)

    return send, lambda t: distributed.recv(t, other), lambda n: torch.zeros(n // 4)


def tensorflow_way(other: int) -> Way:
    import tensorflow as tf

    from tf_impl import ranks

    links, count = ranks._joined.links, {"sent": 0, "taken": 0}

    def message(what: str) -> Message:
        count[what] += 1
        return Message("activation", count[what], 0)

    return (
        lambda t: links.send(other, 1, message("sent"), t),
        lambda t: links.take(other, 1, message("taken")),
        lambda n: tf.zeros(n // 4),
    )


def paddle_way(other: int) -> Way:
    import paddle

    from paddle_impl import groups

    groups._connect({(0, 1), (1, 0)})
    return (
        lambda t: groups.send(t, other),
        lambda t: groups.receive(t, other),
        lambda n: paddle.zeros([n // 4]),
    )


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
    way = globals()[f"{framework}_way"](1 - world.rank)
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
