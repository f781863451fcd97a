"""The optimizers of `TrainSpec` as Keras optimizers, which compile a Keras model.

Differs: PyTorch's and Paddle's own optimizers have these formulas, and a stage makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from common.spec.run import TrainSpec


@keras.saving.register_keras_serializable("triptych")
class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW with epsilon where the others have it.

    Loshchilov and Hutter 2019: w -= rate x m_hat / (sqrt(v_hat) + epsilon). Keras has sqrt(v) +
    epsilon instead, before the bias correction of v ("epsilon hat", Kingma and Ba 2015, section 2).
    Its fused kernel computes

        w -= rate' x m / (sqrt(v) + epsilon')

    which is the first formula for rate' = rate x sqrt(c2) / c1, epsilon' = epsilon x sqrt(c2), c =
    1 - beta^t. Both are computed in float64: in float32, 1 - 0.999^2 would keep only three digits.
    """

    def apply(
        self, grads: Sequence[tf.Tensor], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Compute what does not depend on a weight once for all of them, by type: for each weight
        it would be half of what is traced.
        """
        t = tf.cast(self.iterations, tf.float64) + 1.0
        root = tf.sqrt(1.0 - tf.pow(tf.constant(self.beta_2, tf.float64), t))
        factor = root / (1.0 - tf.pow(tf.constant(self.beta_1, tf.float64), t))
        rate = tf.cast(self.learning_rate, tf.float64) * factor
        self._numbers = {
            dtype: {
                "beta1_power": tf.zeros((), dtype),  # the kernel's own bias correction, off
                "beta2_power": tf.zeros((), dtype),
                "lr": tf.cast(rate, dtype),
                "beta1": tf.constant(self.beta_1, dtype),
                "beta2": tf.constant(self.beta_2, dtype),
                "epsilon": tf.cast(self.epsilon * root, dtype),
            }
            for dtype in dict.fromkeys(gradient.dtype for gradient in grads)
        }
        super().apply(grads, trainable_variables)

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor
    ) -> None:
        index = self._get_variable_index(variable)
        # One kernel that reads every weight once; written out it would be a dozen operations.
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            grad=gradient,
            **self._numbers[variable.dtype],
        )


@keras.saving.register_keras_serializable("triptych")
class SGD(keras.optimizers.SGD):
    """SGD with momentum as PyTorch has it: m = momentum x m + g + decay x w; w -= rate x m.

    Keras' momentum holds the rate: a changing one differs. Its weight decay is decoupled.
    """

    def __init__(
        self, learning_rate: float = 0.01, momentum: float = 0.0, l2: float = 0.0, **options: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, momentum=momentum, **options)
        self.l2 = l2

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor
    ) -> None:
        rate = tf.cast(learning_rate, variable.dtype)
        if self.l2 and self._use_weight_decay(variable):
            gradient = gradient + self.l2 * variable
        if self.momentum:  # without, there is no slot to read
            m = self.momentums[self._get_variable_index(variable)].value
            self.assign(m, self.momentum * m + gradient)
            gradient = m
        self.assign_sub(variable, rate * gradient)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "l2": self.l2}


def make_optimizer(
    train: TrainSpec, not_decayed: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Return the optimizer that `train` asks for; `not_decayed` variables have no weight decay."""
    optimizer: keras.optimizers.Optimizer
    if train.optimizer == "adamw":
        optimizer = AdamW(
            learning_rate=train.learning_rate,
            beta_1=train.beta1,
            beta_2=train.beta2,
            epsilon=train.epsilon,
            weight_decay=train.weight_decay,
            global_clipnorm=train.clip_norm,
        )
    else:
        optimizer = SGD(
            train.learning_rate, train.momentum, train.weight_decay, global_clipnorm=train.clip_norm
        )
    # By the variables themselves: Keras' names of layers are not the canonical ones.
    optimizer.exclude_from_weight_decay(var_list=list(not_decayed))
    return optimizer


def check_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises ValueError for what a pipeline does in another way or not at all."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor:
        raise ValueError("loss scaling is not supported; expected bfloat16, which needs none")
    # Both count calls of the optimizer, of which every stage has its own.
    if optimizer.gradient_accumulation_steps:
        raise ValueError("gradient_accumulation_steps is not supported; use more micro-batches")
    if optimizer.use_ema:
        raise ValueError("use_ema is not supported; expected use_ema=False")


def moments_of(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> dict[str, Callable[[keras.Variable], tf.Variable]]:
    """Return by "first_moment" and "second_moment", if it has them, where a weight's is.

    `variables` are those it was built for, in that order.
    """
    # Keras calls Adam's `_momentums` and `_velocities`, SGD's `momentums`.
    lists = {
        "first_moment": getattr(optimizer, "_momentums", None)
        or getattr(optimizer, "momentums", []),
        "second_moment": getattr(optimizer, "_velocities", []),
    }

    def by_weight(moments: Sequence[keras.Variable]) -> Callable[[keras.Variable], tf.Variable]:
        of = {id(w): moment.value for w, moment in zip(variables, moments, strict=True)}
        return lambda weight: of[id(weight)]

    return {name: by_weight(moments) for name, moments in lists.items() if moments}
