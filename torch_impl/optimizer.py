"""One device's optimizer: `torch.optim`, with the learning rate, the no-decay list and the clipping of `TrainSpec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.spec import TrainSpec
from torch_impl.weights import NamedParameter


class StageOptimizer:
    """AdamW (Loshchilov and Hutter 2019: decay first, epsilon after the bias correction) or SGD over `named`.

    Gradients are clipped in place. A tied weight's copies get the same gradient and so stay equal, bit for bit.
    """

    def __init__(self, train: TrainSpec, named: Sequence[NamedParameter]) -> None:
        self._train = train
        self._named = named
        self._gradients = [item.parameter.grad for item in named]
        groups = [
            {
                "params": [item.parameter for item in named if train.decays(item.name) == decays],
                "weight_decay": train.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer: torch.optim.Optimizer
        if train.optimizer == "adamw":
            betas = (train.beta1, train.beta2)
            self._optimizer = torch.optim.AdamW(groups, betas=betas, eps=train.epsilon, fused=True)
        else:
            self._optimizer = torch.optim.SGD(groups, momentum=train.momentum, fused=True)

    def squared_norms(self) -> list[float]:
        """Each tensor's sum of squared gradients, in float64; that of a tied weight once."""
        norms = [
            torch.linalg.vector_norm(item.parameter.grad, dtype=torch.float64)
            for item in self._named
            if not item.is_copy
        ]
        return torch.stack(norms).square().tolist() if norms else []

    def step(self, step: int, scale: float) -> None:
        """Multiplies the gradients by `scale`, then updates the weights for `step` (from 0)."""
        if scale != 1:
            torch._foreach_mul_(self._gradients, scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self._train.learning_rate_at(step)
        self._optimizer.step()
