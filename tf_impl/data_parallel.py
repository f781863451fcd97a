"""MirroredStrategy as its users write it: the whole model on every device of one process, a loop
over `strategy.run`, each replica its rows. A baseline for p = 1; why strategies do not fit a
pipeline stands in `rank_engine.py`.

Two habits of Keras are undone: the loss is divided by the tokens of all replicas, not by each one's
own (so tf.distribute's guide says), and what is clipped is the norm of the gradients' sum.

Differs: PyTorch's and Paddle's replicas are processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from common.spec.data import IGNORED, Batch
from common.spec.run import RunConfig
from tf_impl import devices
from tf_impl.baseline import PlainEngine


class DataParallelEngine(PlainEngine):
    """All replicas of the plain loop (`common.runtime.engine.Engine`)."""

    def __init__(self, config: RunConfig) -> None:
        """Raises ValueError where replicas would share a GPU."""
        mirrored = devices.stage_devices(config.replicas, config.device)
        if len(set(mirrored)) < config.replicas:
            raise ValueError("executor = plain: each replica takes a GPU; expected device = cpu")
        # Between CPUs of one process collectives are mixed up where sums have several sizes.
        sums = None if "GPU" in mirrored[0] else tf.distribute.ReductionToOneDevice()
        self._strategy = tf.distribute.MirroredStrategy(mirrored, sums)
        with self._strategy.scope():
            super().__init__(config)
        self._device = mirrored
        optimizer = self.model.optimizer
        apply = optimizer.apply

        def apply_sum(gradients: Sequence[Any], *arguments: Any) -> Any:
            """Keras would clip each replica's own gradient, and add up afterwards."""
            replica: Any = tf.distribute.get_replica_context()
            return apply(replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients), *arguments)

        optimizer.apply = apply_sum
        optimizer._all_reduce_sum_gradients = lambda pairs: pairs
        self._step = tf.function(self._step_of_all)

    def forward_backward(self, batch: Batch) -> float:
        if self._first[1] is None:
            self._first = self._first[0], batch
        self.model.optimizer.learning_rate = self.config.train.learning_rate_at(batch.step)
        return float(self._step(*self._dealt(batch)))

    def evaluate(self, batch: Batch) -> float:
        shares, tokens = self._dealt(batch)
        losses = self._strategy.run(
            lambda share: self._loss_of(share, tokens, training=False), (shares,)
        )
        return float(self._sum(losses))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """One process has all replicas."""
        return list(values)

    def _step_of_all(self, shares: Any, tokens: tf.Tensor) -> tf.Tensor:
        def step(share: Any) -> tf.Tensor:
            loss, gradients = self._loss_and_gradients(share, tokens)
            self.model.optimizer.apply(gradients, [item.parameter for item in self._named])
            return loss

        return self._sum(self._strategy.run(step, args=(shares,)))

    def _gradients_of(self, batch: Batch) -> list[tf.Tensor]:
        shares, tokens = self._dealt(batch)
        found = self._strategy.run(
            lambda share: self._loss_and_gradients(share, tokens)[1], (shares,)
        )
        return [self._sum(each) for each in found]

    def _update(self, gradients: Sequence[tf.Tensor]) -> None:
        def update() -> None:
            replica: Any = tf.distribute.get_replica_context()
            # They are the sum already: of one replica, and nothing of the others.
            is_first = int(replica.replica_id_in_sync_group) == 0
            own = [each if is_first else tf.zeros_like(each) for each in gradients]
            self.model.optimizer.apply(own, [item.parameter for item in self._named])

        self._strategy.run(update)

    def _loss_and_gradients(self, share: Any, tokens: tf.Tensor) -> tuple[tf.Tensor, list[Any]]:
        with tf.GradientTape() as tape:
            loss = self._loss_of(share, tokens, training=True)
        found = tape.gradient(loss, [item.parameter.value for item in self._named])
        # An embedding's comes as rows, one per token.
        return loss, [tf.convert_to_tensor(each) for each in found]

    def _loss_of(self, share: Any, tokens: tf.Tensor, training: bool) -> tf.Tensor:
        inputs, targets = share
        logits = self.model(inputs, training=training)  # (b, S, V)
        counts = targets != IGNORED
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.where(counts, targets, 0), logits
        )  # (b, S)
        return tf.reduce_sum(tf.where(counts, losses, 0)) / tf.cast(tokens, losses.dtype)

    def _dealt(self, batch: Batch) -> tuple[Any, tf.Tensor]:
        """Each replica's rows, and the tokens of all."""
        replicas = self.config.replicas
        pieces = [batch.share(replica, replicas, 1)[0] for replica in range(replicas)]
        shares = [
            (
                tuple(map(tf.constant, self._inputs_of(piece, batch.step))),
                tf.constant(piece.targets),
            )
            for piece in pieces
        ]
        dealt = self._strategy.experimental_distribute_values_from_function(
            lambda context: shares[context.replica_id_in_sync_group]
        )
        return dealt, tf.constant(batch.num_tokens, tf.float64)

    def _sum(self, values: Any) -> tf.Tensor:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)
