"""The few operations of `tests.campaigns.batch_norm_model` in PyTorch, with its own norm layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tests.campaigns.batch_norm_model import Arrays, Defaults, Loss, Norm, Tensor


class Ops:
    reshape = staticmethod(torch.reshape)
    transpose = staticmethod(torch.permute)
    gelu = staticmethod(functional.gelu)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array)

    def array(self, tensor: Tensor) -> NDArray[Any]:
        return np.asarray(tensor.detach())

    def take(self, table: Tensor, tokens: NDArray[Any]) -> Tensor:
        return functional.embedding(self.tensor(tokens), table)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    def cross_entropy(self, logits: Tensor, targets: NDArray[Any]) -> Tensor:
        return functional.cross_entropy(logits, self.tensor(targets), reduction="sum")

    def gradient(self, loss: Loss, weights: Arrays) -> tuple[float, Arrays]:
        held = {name: self.tensor(value).requires_grad_() for name, value in weights.items()}
        value = loss(held)
        value.backward()
        found = {name: self.array(each.grad) for name, each in held.items()}
        return float(self.array(value)), found

    def norm(self, kind: str, width: int, new_share: float, epsilon: float) -> Norm:
        layer: torch.nn.Module = torch.nn.LayerNorm(width, epsilon, elementwise_affine=False)
        if kind == "batch norm":
            layer = torch.nn.BatchNorm1d(width, epsilon, momentum=new_share, affine=False)
            layer.double()
        return lambda x, training: layer.train(training)(x)

    def defaults(self, x: NDArray[Any]) -> Defaults:
        layer = torch.nn.BatchNorm1d(x.shape[1]).double()
        layer(self.tensor(x))
        running = np.asarray(layer.running_mean), np.asarray(layer.running_var)
        return Defaults(layer.eps, float(layer.momentum or 0), *running)
