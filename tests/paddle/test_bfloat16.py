"""bfloat16, which Paddle has on GPUs: computed low, added up high."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import numpy as np
import paddle
import pytest

from common.spec.run import TransformerSpec
from paddle_impl import devices
from paddle_impl.dropout import DropoutContext
from paddle_impl.layers import build_unit
from tests.engines import (
    Make,
    bfloat16_errors,
    check_all_float32,
    check_same_bits,
    stretch,
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


@pytest.mark.usefixtures("kernels")
def test_errors_of_bfloat16_have_no_sign() -> None:
    """A block's output and gradients beside the same block in float64: by how much rounding
    stretches them all.
    """
    paddle.seed(0)
    paddle.set_default_dtype("float32")
    spec = TransformerSpec(context_length=16, d_model=32, num_heads=4, d_ff=64, dropout=0.1)
    context = DropoutContext(step_key=5, samples=np.arange(64))
    low = build_unit(spec, "block.0", context)
    for parameter in low.parameters():
        factor = 0.2 if parameter.ndim == 2 else 1.0
        value = paddle.randn(parameter.shape) * factor
        parameter.set_value(value.astype("bfloat16").astype("float32"))
    high = copy.deepcopy(low).to(dtype="float64")
    start, dy = (paddle.randn([64, 16, 32]).astype("bfloat16") for _ in range(2))

    def run(block: paddle.nn.Layer, dtype: str) -> list[Any]:
        x = start.astype(dtype)
        x.stop_gradient = False
        y = block(x)
        paddle.autograd.backward([y], [dy.astype(dtype)])
        found = [y, x.grad, *(parameter.grad for parameter in block.parameters())]
        return [tensor.astype("float64").numpy() for tensor in found]

    names = ["output", "input", *(name for name, _ in low.named_parameters())]
    runs = zip(names, run(low, "bfloat16"), run(high, "float64"), strict=True)
    roundoffs = {name: stretch(found, right) for name, found, right in runs}
    assert roundoffs["output"] < 0.2 and roundoffs["input"] < 0.2, roundoffs
    assert statistics.median(roundoffs.values()) < 0.4, roundoffs
