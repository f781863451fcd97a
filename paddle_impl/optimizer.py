"""One stage's optimizer: `paddle.optimizer`, with the learning rate, the no-decay list and the clipping of `TrainSpec`."""

from __future__ import annotations

from collections.abc import Sequence

import paddle

from common.spec import TrainSpec
from paddle_impl.weights import NamedParameter


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019: decay first, epsilon after the bias correction) or SGD over `named`.

    Gradients are clipped in place. A tied weight's copies get the same gradient and so stay equal, bit for bit.
    """

    def __init__(self, train: TrainSpec, named: Sequence[NamedParameter]) -> None:
        self._train = train
        self._named = named
        parameters = [item.parameter for item in named]
        decayed = {item.parameter.name for item in named if train.decays(item.name)}
        self._optimizer: paddle.optimizer.Optimizer
        if train.optimizer == "adamw":
            self._optimizer = paddle.optimizer.AdamW(
                train.learning_rate,
                train.beta1,
                train.beta2,
                train.epsilon,
                parameters,
                weight_decay=train.weight_decay,
                apply_decay_param_fun=decayed.__contains__,
            )
        else:
            # Differs: Paddle's Momentum decays by `weight_decay` per group, and takes no function of the name.
            groups = [
                {
                    "params": [p for p in parameters if (p.name in decayed) == decays],
                    "weight_decay": train.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ]
            groups = [group for group in groups if group["params"]]
            self._optimizer = paddle.optimizer.Momentum(train.learning_rate, train.momentum, groups)

    def squared_norms(self) -> dict[str, float]:
        """Each tensor's sum of squared gradients by canonical name, in float64; that of a tied weight once.

        Differs: by name, since the processes of all stages add their numbers up.
        """
        own = [item for item in self._named if not item.is_copy]
        squares = [_sum_of_squares(item.parameter.grad) for item in own]
        return dict(zip((item.name for item in own), paddle.stack(squares).tolist(), strict=True)) if own else {}

    @paddle.no_grad()
    def step(self, step: int, scale: float) -> None:
        """Multiplies the gradients by `scale`, then updates the weights for `step` (from 0)."""
        if scale != 1:
            for item in self._named:
                item.parameter.grad.scale_(scale)
        self._optimizer.set_lr(self._train.learning_rate_at(step))
        self._optimizer.step()


@paddle.no_grad()
def _sum_of_squares(gradient: paddle.Tensor) -> paddle.Tensor:
    flat = gradient.flatten().astype("float64")
    return paddle.dot(flat, flat)
