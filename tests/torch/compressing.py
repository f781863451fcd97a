"""Three replicas as processes that add up compressed gradients: `python -m
tests.torch.compressing FOLDER` (`tests.compression`).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from common.spec.run import RunConfig
from tests.compression import REPLICAS, TENSORS, Arrays, Sum, exchange, start_ranks
from torch_impl.compression import Compressor
from torch_impl.weights import NamedParameter, to_array

SENT = {"all_reduce": (0, 2), "all_to_all_single": (1, 1), "all_gather_single": (1, 0)}
"""Where a collective has what this rank sends, and how often 1/d of that goes to each other rank;
0: the whole."""
sent_bytes = 0


def counted(name: str, *arguments: Any, **options: Any) -> Any:
    """One of torch.distributed's collectives, after a note of what it sends."""
    global sent_bytes
    place, times = SENT[name]
    size = distributed.get_world_size(options["group"])
    length = arguments[place].numel() * arguments[place].element_size()
    sent_bytes += (size - 1) * (length * times // size if times else length)
    return ORIGINAL[name](*arguments, **options)


ORIGINAL = {name: getattr(distributed, name) for name in SENT}


def summing(groups: dict[int, Any], config: RunConfig) -> Sum:
    def stored(array: Any, is_linear: bool) -> torch.Tensor:
        return torch.tensor(array.T if is_linear else array)

    dtype = getattr(torch, config.train.dtype)
    named = [
        NamedParameter(
            t.name,
            torch.zeros(t.shape[::-1] if t.is_linear else t.shape, dtype=dtype),
            t.is_linear,
            t.is_copy,
        )
        for t in TENSORS
    ]
    compressor = Compressor(config, named)

    def add(given: Any) -> tuple[Arrays, int]:
        global sent_bytes
        sent_bytes = 0
        gradients = [stored(given[t.key], t.is_linear) for t in TENSORS]
        compressor.start(gradients, groups[config.replicas]).finish()
        found = {
            t.key: to_array(g.T if t.is_linear else g)
            for t, g in zip(TENSORS, gradients, strict=True)
        }
        return found, sent_bytes

    return add


def _rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    size = max(REPLICAS)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    groups = {count: distributed.new_group(list(range(count))) for count in REPLICAS}
    for name in SENT:
        setattr(distributed, name, partial(counted, name))
    exchange("torch", rank, folder, partial(summing, groups))
    distributed.barrier()


if __name__ == "__main__":
    sys.exit(start_ranks(max(REPLICAS), partial(_rank, Path(sys.argv[1]))))
