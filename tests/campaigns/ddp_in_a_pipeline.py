"""What DistributedDataParallel makes of a stage's gradients in a pipeline's order of actions.

    python -m tests.campaigns.ddp_in_a_pipeline

Prints a table of docs/hosts.md: two replicas of a small stage in float64, four micro-batches
each; the gradient beside the mean over all eight, which is what it promises.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from common.report.grid import Grid

M, REPLICAS = 4, 2
ORDERS = {
    "one after another": "F0 B0 F1 B1 F2 B2 F3 B3",
    "gpipe": "F0 F1 F2 F3 B0 B1 B2 B3",
    "1f1b, first of two stages": "F0 F1 B0 F2 B1 F3 B2 B3",
    "gpipe, backwards in reverse": "F0 F1 F2 F3 B3 B2 B1 B0",
}
TITLES = ("order", "sums", "error of the gradient", "replicas equal")


def micro_batch(replica: int, i: int) -> Tensor:
    made = torch.Generator().manual_seed(10 * replica + i)
    return torch.randn(4, 8, generator=made, dtype=torch.float64)


def run(stage: DistributedDataParallel, replica: int, order: str, summed: Collection[int]) -> None:
    """Do the actions; micro-batches that are not in `summed` are in `no_sync`."""
    losses: dict[int, Tensor] = {}
    for action in order.split():
        i = int(action[1:])
        guard: AbstractContextManager[Any] = nullcontext() if i in summed else stage.no_sync()
        with guard:
            if action[0] == "F":
                losses[i] = stage(micro_batch(replica, i)).sum()
            else:
                losses.pop(i).backward()


def with_grad(stage: DistributedDataParallel, replica: int) -> None:
    """As W gets its gradients: autograd returns them, and no hook hears of it."""
    for i in range(M):
        parameters = list(stage.module.parameters())
        found = torch.autograd.grad(stage(micro_batch(replica, i)).sum(), parameters)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def one_rank(replica: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=replica, world_size=REPLICAS)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    for r in range(REPLICAS):
        for i in range(M):
            (net(micro_batch(r, i)).sum() / REPLICAS).backward()
    weight = net[0].weight
    assert isinstance(weight, Tensor) and weight.grad is not None
    right = weight.grad.clone()
    every, last = range(M), {name: {int(order[-1])} for name, order in ORDERS.items()}
    tries: list[tuple[str, str, Any]] = [
        (name, sums, lambda stage, o=order, s=which: run(stage, replica, o, s))
        for name, order in ORDERS.items()
        for sums, which in (("every backward", every), ("the last", last[name]))
    ]
    tries.append(("autograd.grad", "every", lambda stage: with_grad(stage, replica)))
    rows = []
    for name, sums, work in tries:
        net.zero_grad()
        stage = DistributedDataParallel(net)
        try:
            work(stage)
        except RuntimeError as error:
            rows.append((name, sums, str(error).splitlines()[0].split(". ")[0], ""))
            continue
        found: list[Any] = [None] * REPLICAS
        distributed.all_gather_object(found, weight.grad)
        off = float((found[0] - right).norm() / right.norm())
        words = f"{off:.0%}" if off > 1e-12 else f"{off:.0e}"
        rows.append((name, sums, words, "yes" if torch.equal(*found) else "no"))
    if replica == 0:
        print(Grid(TITLES, rows, TITLES).markdown().strip())
    distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = int(server.getsockname()[1])
    multiprocessing.spawn(one_rank, (free,), REPLICAS)  # type: ignore[attr-defined]
