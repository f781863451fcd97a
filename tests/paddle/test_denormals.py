"""Numbers that are almost 0 (`paddle_impl.denormals`)."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import paddle
import pytest


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="another processor"
)
@pytest.mark.parametrize("own_thread", [False, True])
def test_denormals_are_zero_in_every_thread(own_thread: bool) -> None:
    def product(a: float, b: float) -> float:
        return (paddle.full([64], a, "float32") * paddle.full([64], b, "float32")).max().item()

    with ThreadPoolExecutor(1) as thread:

        def run(a: float, b: float) -> float:
            return thread.submit(product, a, b).result() if own_thread else product(a, b)

        assert run(1e-30, 1e-10) == 0  # what comes out
        assert run(1e-40, 1e10) == 0  # what goes in
        assert run(1e-30, 1e-7) > 0
