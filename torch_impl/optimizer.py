"""One device's `torch.optim`, with the rate, no-decay list and clipping of `TrainSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch.optim import SGD, AdamW

from common.spec.run import TrainSpec
from torch_impl.gradients import gradient_of
from torch_impl.weights import NamedParameter, export_weights, load_weights


def learning_rate(train: TrainSpec, step: int) -> float:
    """That of `step` (from 0)."""
    return train.learning_rate_at(step)


class StageOptimizer:
    """AdamW (Loshchilov and Hutter 2019: decay first, epsilon after bias correction) or SGD.

    Gradients are clipped in place. A tied weight's copies get the same gradient and stay equal.
    """

    def __init__(self, train: TrainSpec, named: Sequence[NamedParameter]) -> None:
        self._train = train
        self._named = named
        self._gradients = [gradient_of(item.parameter) for item in named]
        # One group for each weight decay, the larger one first.
        decays = [train.weight_decay if train.decays(item.name) else 0.0 for item in named]
        groups = [
            {
                "params": [
                    item.parameter
                    for item, decay in zip(named, decays, strict=True)
                    if decay == value
                ],
                "weight_decay": value,
            }
            for value in sorted(set(decays), reverse=True)
        ]
        self._optimizer: torch.optim.Optimizer
        if train.optimizer == "adamw":
            betas = (train.beta1, train.beta2)
            # fused: a weight, its gradient and its moments are read and written once.
            self._optimizer = AdamW(groups, betas=betas, eps=train.epsilon, fused=True)
            self._moments = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
        else:
            self._optimizer = SGD(groups, momentum=train.momentum, fused=True)
            self._moments = {"first_moment": "momentum_buffer"} if train.momentum else {}

    def squared_norms(self, counts: Callable[[str], bool] = lambda name: True) -> list[float]:
        """Return each tensor's sum of squared gradients, in float64; that of a tied weight once,
        and of those alone whose name `counts`.
        """
        norms = [
            torch.linalg.vector_norm(gradient_of(item.parameter), dtype=torch.float64)
            for item in self._named
            if not item.is_copy and counts(item.name)
        ]
        return torch.stack(norms).square().tolist() if norms else []

    def step(self, step: int, scale: float) -> None:
        """Multiply the gradients by `scale`, then updates the weights for `step` (from 0)."""
        if scale != 1:
            torch._foreach_mul_(self._gradients, scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, step)
        self._optimizer.step()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the moments by "first_moment/<name>", "second_moment/<name>"; zeros at first."""
        found = {}
        for moment, key in self._moments.items():
            for item in self._named:
                # PyTorch makes its state in the first step.
                tensor = self._optimizer.state.get(item.parameter, {}).get(key)
                tensor = torch.zeros_like(item.parameter) if tensor is None else tensor
                found[f"{moment}/{item.name}"] = export_weights([item._replace(parameter=tensor)])[
                    item.name
                ]
        return found

    @torch.no_grad()
    def load_state(self, arrays: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        """Load what `state` gave after `steps_done` steps. Raises KeyError for a missing moment."""
        for item in self._named:
            state = {key: torch.empty_like(item.parameter) for key in self._moments.values()}
            for moment, key in self._moments.items():
                given = {item.name: arrays[f"{moment}/{item.name}"]}
                load_weights([item._replace(parameter=state[key])], given)
            if self._train.optimizer == "adamw":
                # AdamW's bias correction counts from here on.
                state["step"] = torch.tensor(float(steps_done), device=item.parameter.device)
            self._optimizer.state[item.parameter] = state
