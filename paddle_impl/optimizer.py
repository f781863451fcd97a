"""One stage's `paddle.optimizer`, with the rate, no-decay list and clipping of `TrainSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from common.spec.run import TrainSpec
from paddle_impl.weights import NamedParameter


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
        self._optimizer = self._build()
        # Differs: Paddle makes the moments in its first step; they are to be read and set before.
        self._optimizer._create_accumulators(
            paddle.static.default_main_program().global_block(), [item.parameter for item in named]
        )

    def _build(self) -> paddle.optimizer.Optimizer:
        train = self._train
        if train.optimizer == "sgd":
            groups = _decay_groups(train, self._named)
            return paddle.optimizer.Momentum(train.learning_rate, train.momentum, groups)
        decayed = {item.parameter.name for item in self._named if train.decays(item.name)}
        return paddle.optimizer.AdamW(
            train.learning_rate,
            train.beta1,
            train.beta2,
            train.epsilon,
            [item.parameter for item in self._named],
            weight_decay=train.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
        )

    def squared_norms(self, counts: Callable[[str], bool] = lambda name: True) -> dict[str, float]:
        """Return each tensor's sum of squared gradients by canonical name, in float64; that of a
        tied weight once, and of those alone whose name `counts`.

        Differs: by name, since the processes of all stages add their numbers up.
        """
        squares = {
            item.name: _sum_of_squares(item.parameter.grad)
            for item in self._named
            if not item.is_copy and counts(item.name)
        }
        numbers = paddle.stack(list(squares.values())).tolist() if squares else []
        return dict(zip(squares, numbers, strict=True))

    @paddle.no_grad()
    def step(self, step: int, scale: float) -> None:
        """Multiply the gradients by `scale`, then updates the weights for `step` (from 0)."""
        if scale != 1:
            for item in self._named:
                item.parameter.grad.scale_(scale)
        self._optimizer.set_lr(learning_rate(self._train, step))
        self._optimizer.step()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the moments as `common.runtime.engine.Engine.optimizer_state` names them."""
        return {key: moment.numpy().copy() for key, moment in self._moments()}

    def load_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        """Put the moments back, and the betas' powers as after `steps_done` steps."""
        for key, moment in self._moments():
            moment.set_value(state[key])
        if self._train.optimizer == "adamw":
            for name, beta in (
                ("beta1_pow_acc", self._train.beta1),
                ("beta2_pow_acc", self._train.beta2),
            ):
                factor = np.full([1], beta, self._train.master_dtype)
                value = factor.copy()
                for _ in range(steps_done):  # not a power: every step of Paddle's rounds
                    value *= factor
                for power in self._optimizer._accumulators[name].values():
                    power.set_value(value)

    def _moments(self) -> list[tuple[str, paddle.Tensor]]:
        """Each with its key, "<moment>/<canonical name>"; a tied copy has the same key."""
        kinds = {"first_moment": "velocity"} if self._train.momentum else {}
        if self._train.optimizer == "adamw":
            kinds = {"first_moment": "moment1", "second_moment": "moment2"}
        kept = self._optimizer._accumulators
        return [
            (f"{kind}/{i.name}", kept[own][i.parameter.name])
            for kind, own in kinds.items()
            for i in self._named
        ]


def _decay_groups(train: TrainSpec, named: Sequence[NamedParameter]) -> list[dict[str, Any]]:
    """Parameters by weight decay. Differs: Paddle's Momentum takes no function of the name."""
    groups = [
        {
            "params": [item.parameter for item in named if train.decays(item.name) == decays],
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


@paddle.no_grad()
def _sum_of_squares(gradient: paddle.Tensor) -> paddle.Tensor:
    flat = gradient.flatten().astype("float64")
    return paddle.dot(flat, flat)
