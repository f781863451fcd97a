"""`TrainSpec`'s optimizers as Keras optimizers, and any one on one device of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from common.spec.run import TrainSpec
from tf_impl.effects import custom_gradients, forget_gradients
from tf_impl.executors import any_executor
from tf_impl.keras_pipeline.keras_copy import shallow_copy


def learning_rate(train: TrainSpec, step: int) -> float:
    """That of `step` (from 0)."""
    return train.learning_rate_at(step)


def _squared(gradient: tf.Variable) -> tf.Tensor:
    with tf.device(gradient.device):
        return tf.reduce_sum(tf.square(tf.cast(gradient, tf.float64)))


class StageOptimizer:
    """`optimizer`, at work on the weights of one stage.

    Keras puts slots beside their weights, so this is the same optimizer with the same slots, and
    `optimizer.variables` has all of them. What is one number for all weights (iterations, learning
    rate, Nadam's product of momenta) has a copy here, since stages run at once and cannot wait for
    one another. It never clips by the global norm, since it sees only a part of the gradients: the
    model does, over all stages.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
        variables: Sequence[keras.Variable],
        gradients: Sequence[tf.Variable],
        counted: Sequence[tf.Variable],
    ) -> None:
        """`optimizer` is built; `counted` is what the norm is over, without a tied second copy."""
        scalars = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, keras.Variable)
        }
        with strategy.scope():
            copies = {
                name: keras.Variable(v.numpy(), dtype=v.dtype, trainable=False, name=v.name)
                for name, v in scalars.items()
            }
            rate = keras.Variable(0.0, trainable=False, name="learning_rate")
        # The slots, which are lists of variables, are shared with `optimizer`.
        own = shallow_copy(
            optimizer,
            **copies | {"_learning_rate": rate},
            _distribution_strategy=strategy,
            global_clipnorm=None,
            _trainable_variables=list(variables),
        )

        @tf.function(autograph=False)
        def squares() -> tf.Tensor:
            return tf.stack([_squared(g) for g in counted])

        @tf.function(autograph=False)
        def update(scale: tf.Tensor) -> None:
            # Keras reduces gradients over replicas where it finds none; here there is one.
            def on_replica() -> None:
                # Also where it is 1: a second trace, in a step that clips nothing, takes a second.
                own.apply([g * tf.cast(scale, g.dtype) for g in gradients], variables)

            strategy.run(on_replica)

        self._update: Callable[[tf.Tensor], None] = update
        self._executor: Callable[[], contextlib.AbstractContextManager[Any]] = (
            contextlib.nullcontext
        )
        if variables:
            concrete = update.get_concrete_function(tf.TensorSpec((), tf.float64))
            self._update, graph = concrete, concrete.graph
            forget_gradients(custom_gradients(graph))  # of the strategy's all-reduce
            # Keras does not put every slot beside its weight (Adafactor's rows and columns).
            device = strategy.extended.worker_devices[0]
            if any(outer.device != device for outer, _ in graph.captures):
                self._executor = any_executor
        self._squares, self._rate = squares, rate
        self._scalars = [
            (scalars[name], copies[name]) for name in scalars if name != "_learning_rate"
        ]
        self._has_counted = bool(counted)
        self.is_empty = not variables

    def squared_norms(self) -> list[float]:
        """Return each tensor's sum of squared gradients, in float64."""
        return self._squares().numpy().tolist() if self._has_counted else []

    def step(self, learning_rate: float, scale: float) -> None:
        """One update of the weights, with the gradients times `scale`."""
        if not self.is_empty:
            for shared, copy in self._scalars:
                copy.assign(shared.numpy())
            self._rate.assign(learning_rate)
            with self._executor():
                self._update(tf.constant(scale, tf.float64))

    def share(self) -> None:
        """Give the optimizer what a step made of its scalars: the same on all stages."""
        for shared, copy in self._scalars:
            shared.assign(copy.numpy())
