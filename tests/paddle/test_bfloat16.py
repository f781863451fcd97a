"""bfloat16, which Paddle has on GPUs: computed low, added up high."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from paddle_impl import devices
from tests.engines import (
    Make,
    bfloat16_errors,
    check_all_float32,
    check_same_bits,
    train,
)
from tests.paddle import bfloat16_kernels

OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "dropout": 0.1, "tied_head": True}
LLAMA: dict[str, Any] = {"norm_kind": "rms", "activation": "swiglu", "position": "rotary"}


def test_a_cpu_is_refused_by_what_it_lacks(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"^dtype = bfloat16: Paddle .* on cpu has no kernel for matmul, add, gelu"
    ):
        make(1, dtype="bfloat16")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16_kernels.install(monkeypatch)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("model", [{}, LLAMA])
def test_bfloat16_computes_low_and_adds_up_high(make: Make, model: dict[str, Any]) -> None:
    devices.check_dtype("bfloat16")
    engine = make(1, "gpipe", **OPTIONS | model)
    loss, gradient = bfloat16_errors(engine)
    assert loss < 1e-3 and gradient < 0.03  # one rounding is 0.004
    train(engine, range(3))
    check_all_float32(engine)
    for item in engine.stage.named:
        rounded = item.parameter.astype("bfloat16").astype("float32")
        assert item.parameter.grad.dtype == paddle.float32, item.name
        assert not np.array_equal(item.parameter.numpy(), rounded.numpy()), item.name


@pytest.mark.usefixtures("kernels")
def test_bfloat16_has_the_same_bits_in_every_schedule(make: Make) -> None:
    runs = [(1, "gpipe", {}), (1, "zb-h1", {}), (1, "1f1b", {"recompute": "every-1"})]
    check_same_bits(make, runs, 3, **OPTIONS)
