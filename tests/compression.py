"""Compressed sums over replicas that are processes, beside the oracle's: what all three frameworks'
tests share. Imports no framework.

Every rank calls `exchange`, with its framework's way to add up a few tensors, and leaves what it
got in a file; `check` compares all files with the oracle, and the bytes sent with the formula.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.oracle.compression import TIED_COPY, CompressedSum
from common.oracle.limits import LIMITS
from common.spec.parameters import TOKEN_EMBEDDING
from common.spec.run import RunConfig
from tests.engines import small

Arrays = dict[str, Any]
Sum = Callable[[Mapping[str, Any]], tuple[Arrays, int]]
"""A replica's gradients by name -> the sums by name, and the bytes that this rank has sent."""

KINDS = ("none", "fp16", "bf16", "powersgd:2", "powersgd:1", "topk:0.1", "sign", "ef-sign")
REPLICAS = (2, 3)
STEPS = 3


class Given(NamedTuple):
    """A tensor, as the canonical names have it."""

    name: str
    shape: tuple[int, ...]
    is_linear: bool = False
    is_copy: bool = False

    @property
    def key(self) -> str:
        return TIED_COPY if self.is_copy else self.name


# Sizes that neither 2 nor 3 slices have to fill up, so that formulas are exact.
TENSORS = (
    Given(TOKEN_EMBEDDING, (36, 24)),
    Given("block.0.attention.query.weight", (24, 30), is_linear=True),
    Given("block.0.attention.query.bias", (30,)),
    Given("block.0.norm_1.weight", (24,)),
    Given("narrow.weight", (1, 18)),  # whose factors would be no smaller
    Given(TOKEN_EMBEDDING, (36, 24), is_copy=True),
)


def config(framework: str, compress: str, dtype: str, replicas: int) -> RunConfig:
    run = {"compress": compress, "replicas": replicas}
    return small(framework, dtype=dtype, run=run, train={"seed": 3, "micro_batches": 1})


def gradients(replica: int, step: int) -> Arrays:
    """Whole multiples of 2^-18, so that float32 adds without rounding. In step 1 the query's
    gradient is 0, in step 0 the copy's has rank 1, that of the sum too.
    """
    random = np.random.default_rng([replica, step])
    found = {each.key: random.integers(-(2**18), 2**18, each.shape) / 2**18 for each in TENSORS}
    if step == 0:
        column = np.random.default_rng(0).integers(-(2**16), 2**16, 36) / 2**18
        found[TIED_COPY][:] = (replica + 1) * np.outer(column, np.arange(1, 25))
    if step == 1:
        found["block.0.attention.query.weight"][:] = 0
    return found


def start_ranks(count: int, rank: Callable[[int], None]) -> int:
    """Run `rank(r)` in so many forked processes; return the worst exit status."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(r,)) for r in range(count)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    return max(abs(each.exitcode or 0) for each in ranks)


def exchange(framework: str, rank: int, folder: Path, make: Callable[[RunConfig], Sum]) -> None:
    """Call `make(config)`, then its result for every step, for all kinds, precisions and sizes."""
    found: Arrays = {}
    for replicas in REPLICAS:
        for compress in KINDS if rank < replicas else ():
            for dtype in ("float32", "float64"):
                add = make(config(framework, compress, dtype, replicas))
                for step in range(STEPS):
                    given = {k: v.astype(dtype) for k, v in gradients(rank, step).items()}
                    sums, sent = add(given)
                    key = f"{replicas}|{compress}|{dtype}|{step}"
                    found |= {f"{key}|{name}": value for name, value in sums.items()}
                    found[f"{key}|bytes"] = np.array(sent)
    np.savez(folder / f"{rank}.npz", **found)


def check(framework: str, folder: Path) -> None:
    """Compare what all ranks got with each other, and with the oracle."""
    ranks = [np.load(folder / f"{rank}.npz") for rank in range(max(REPLICAS))]
    for replicas in REPLICAS:
        for compress in KINDS:
            for dtype in ("float32", "float64"):
                one = config(framework, compress, dtype, replicas)
                oracle = CompressedSum(one.compression, one.train.seed)
                element = np.dtype(dtype).itemsize
                message = sum(one.compression.message_bytes(t.shape, element) for t in TENSORS)
                sent = one.compression.pair_bytes(message, replicas) * (replicas - 1)
                for step in range(STEPS):
                    expected = oracle([gradients(r, step) for r in range(replicas)])
                    key = f"{replicas}|{compress}|{dtype}|{step}"
                    for name, right in expected.items():
                        seen = [each[f"{key}|{name}"] for each in ranks[:replicas]]
                        assert all(np.array_equal(seen[0], other) for other in seen), key
                        error = np.linalg.norm(seen[0] - right) / (np.linalg.norm(right) or 1)
                        assert error <= LIMITS["gradient"][dtype], (key, name, error)
                    for each in ranks[:replicas]:
                        assert int(each[f"{key}|bytes"]) == sent, key
