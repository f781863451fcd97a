"""Puts late kernels under PyTorch where there are fake GPUs (`__main__.py`); elsewhere nothing is
collected.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines import Make, maker

if "FAKE_GPUS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    from tests.campaigns.fake_gpu import late_kernels
    from torch_impl import devices

    # PyTorch warns of each kernel that is replaced.
    with warnings.catch_warnings(action="ignore"):
        LIBRARY = late_kernels.install()
    devices.configure(1, 1, "cuda")  # one thread a kernel: a sum's bits depend on it


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds engines on the CPU; those of a test for GPUs say `run={"device": "cuda"}`, or use
    `on_gpus`.
    """
    from torch_impl.engine import build_engine

    late_kernels.errors.clear()
    yield from maker("torch", build_engine)
    assert late_kernels.errors == []


@pytest.fixture
def on_gpus(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Make]:
    """`on_gpus(n)` is a `make` whose engines find `n` GPUs. The fake runtime cannot capture CUDA
    graphs.
    """

    def builder(count: int) -> Make:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

        def build(*arguments: Any, run: dict[str, Any] | None = None, **options: Any) -> Any:
            return make(
                *arguments, run={"device": "cuda", "cuda_graphs": "off"} | (run or {}), **options
            )

        return build

    return builder
