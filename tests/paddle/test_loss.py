"""Extreme values: where Paddle's own kernels clip, and a model under FLAGS_check_nan_inf."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from common.spec.data import IGNORED
from common.spec.run import TransformerSpec
from paddle_impl.dropout import DropoutContext
from paddle_impl.layers import Attention, build_unit, summed_loss
from paddle_impl.split_linear import Linear


def test_paddles_own_kernels_clip() -> None:
    """Why the loss is written out. When this fails, Paddle has changed and
    `functional.cross_entropy` may come back.
    """
    logits = paddle.to_tensor([[0.0, 100.0]], "float64")
    assert functional.cross_entropy(logits, paddle.to_tensor([0])).item() == 64
    assert functional.softmax(logits)[0, 0].item() == pytest.approx(np.exp(-64))


def test_a_loss_of_ignored_labels_alone_is_nothing() -> None:
    x = paddle.randn([2, 3, 5])
    x.stop_gradient = False
    found = summed_loss(x, paddle.full([2, 3], IGNORED, "int64"), 7)
    found.backward()
    assert (found.item(), float(x.grad.abs().max())) == (0, 0)


def test_the_finite_mask_gives_the_bits_of_an_infinite_one() -> None:
    attention = Attention(
        TransformerSpec(context_length=8, d_model=16, num_heads=2, d_ff=16), 0, DropoutContext()
    )
    x = 30 * paddle.randn([2, 8, 16])
    finite = attention(x).numpy()
    attention.causal = paddle.full([8, 8], -np.inf).triu(1)
    assert np.array_equal(finite, attention(x).numpy())


def test_a_block_and_its_loss_pass_paddles_search_for_infinities() -> None:
    spec = TransformerSpec(context_length=4, d_model=8, num_heads=2, d_ff=8, vocab_size=8)
    units = [build_unit(spec, name, DropoutContext()) for name in ("embedding", "block.0", "head")]
    for layer in (part for unit in units for part in unit.sublayers() if isinstance(part, Linear)):
        layer.weight.set_value(paddle.ones_like(layer.weight))
    tokens = paddle.to_tensor([[1, 2, 3, 4]])
    paddle.set_flags({"FLAGS_check_nan_inf": True})
    try:
        x = tokens
        for unit in units:
            x = unit(x)
        summed_loss(x, paddle.to_tensor([[2, 3, 4, IGNORED]]), 3).backward()
    finally:
        paddle.set_flags({"FLAGS_check_nan_inf": False})
