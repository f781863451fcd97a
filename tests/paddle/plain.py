"""The few operations of `tests.campaigns.batch_norm_model` in Paddle, with its own norm layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.nn import functional

from tests.campaigns.batch_norm_model import Arrays, Defaults, Loss, Norm, Tensor


def batch_norm(width: int, **options: Any) -> Any:
    """Return the layer in float64: it takes the default type when it is made."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype("float64")
    try:
        return paddle.nn.BatchNorm1D(width, **options)
    finally:
        paddle.set_default_dtype(before)


class Ops:
    reshape = staticmethod(paddle.reshape)
    transpose = staticmethod(paddle.transpose)
    gelu = staticmethod(functional.gelu)
    softmax = staticmethod(functional.softmax)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return paddle.to_tensor(array, place=paddle.CPUPlace())

    def array(self, tensor: Tensor) -> NDArray[Any]:
        return np.asarray(tensor.numpy())

    def take(self, table: Tensor, tokens: NDArray[Any]) -> Tensor:
        return functional.embedding(self.tensor(tokens), table)

    def cross_entropy(self, logits: Tensor, targets: NDArray[Any]) -> Tensor:
        return functional.cross_entropy(logits, self.tensor(targets), reduction="sum")

    def gradient(self, loss: Loss, weights: Arrays) -> tuple[float, Arrays]:
        held = {name: self.tensor(value) for name, value in weights.items()}
        for each in held.values():
            each.stop_gradient = False
        value = loss(held)
        value.backward()
        return float(value), {name: self.array(each.grad) for name, each in held.items()}

    def norm(self, kind: str, width: int, new_share: float, epsilon: float) -> Norm:
        plain = {"epsilon": epsilon, "weight_attr": False, "bias_attr": False}
        layer: Any = paddle.nn.LayerNorm(width, **plain)
        if kind == "batch norm":
            layer = batch_norm(width, momentum=1 - new_share, **plain)

        def call(x: Tensor, training: bool) -> Tensor:
            layer.training = training
            return layer(x)

        return call

    def defaults(self, x: NDArray[Any]) -> Defaults:
        layer = batch_norm(x.shape[1])
        layer(self.tensor(x))
        running = self.array(layer._mean), self.array(layer._variance)
        return Defaults(layer._epsilon, layer._momentum, *running)
