"""The numerical habits of `common.spec.habits` that Paddle has: each puts back what the main code
decides otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.nn import functional

from common.spec.data import IGNORED
from common.spec.run import RunConfig
from paddle_impl import engine, layers, stage
from paddle_impl.dropout import DropoutContext, keep_mask, native_dropout
from paddle_impl.engine import PaddleEngine
from paddle_impl.optimizer import Optimizer, decay_groups
from paddle_impl.pipeline import StageLayers
from paddle_impl.stage import Stage
from paddle_impl.weights import NamedParameter, load_weights


class Patch(NamedTuple):
    """What stands for `name` in `place` as long as the habit lasts."""

    place: Any
    name: str
    habit: Any


Habit = Callable[[RunConfig], list[Patch]]


@contextmanager
def switch(config: RunConfig) -> Iterator[None]:
    """Return the habit that `config.drift` names, for as long as the context lives. Raises
    ValueError for one not known here.
    """
    if config.drift is not None and config.drift not in HABITS:
        raise ValueError(f"drift = {config.drift}; expected for paddle: one of {', '.join(HABITS)}")
    if config.drift is not None and config.executor == "plain":
        raise ValueError(f"drift = {config.drift}; executor = plain takes none")
    with ExitStack() as patches:
        for patch in HABITS[config.drift](config) if config.drift else ():
            patches.enter_context(mock.patch.object(*patch))
        yield


# --------------------------------------------------------------------------------------------- loss


def mean_over_all_labels(config: RunConfig) -> list[Patch]:
    """Paddle's mean counts ignored labels too, where `ignore_index` is negative."""
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        return (
            functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            / m
        )

    return [Patch(stage, "summed_loss", loss)]


def clipped_loss(config: RunConfig) -> list[Patch]:
    """Paddle's own kernel: on CPU no loss exceeds 64 + log V."""

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        logits, targets = logits.flatten(0, 1), targets.flatten()
        return (
            functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            / num_tokens
        )

    return [Patch(stage, "summed_loss", loss)]


def mean_per_micro_batch(config: RunConfig) -> list[Patch]:
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        return layers.summed_loss(logits, targets, max(1, (targets != IGNORED).sum().item())) / m

    return [Patch(stage, "summed_loss", loss)]


def unscaled_micro_batches(config: RunConfig) -> list[Patch]:
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        return layers.summed_loss(logits, targets, num_tokens) * m

    return [Patch(stage, "summed_loss", loss)]


# ---------------------------------------------------------------------------------------- optimizer


def per_stage_clipping(config: RunConfig) -> list[Patch]:
    def own_squared_norms(self: PaddleEngine) -> list[float]:
        return list(self._optimizer.squared_norms().values())

    return [Patch(PaddleEngine, "_squared_norms", own_squared_norms)]


def with_train(**changes: Any) -> Habit:
    """Return an optimizer that reads these fields of `TrainSpec` otherwise."""

    def habit(config: RunConfig) -> list[Patch]:
        return [
            Patch(
                engine,
                "Optimizer",
                lambda train, named: Optimizer(train.model_copy(update=changes), named),
            )
        ]

    return habit


class AdamWithL2(Optimizer):
    """`paddle.optimizer.Adam(weight_decay=...)`: the decay goes through the moments."""

    def _build(self) -> paddle.optimizer.Optimizer:
        train = self._train
        groups = decay_groups(train, self._named)
        return paddle.optimizer.Adam(
            train.learning_rate, train.beta1, train.beta2, train.epsilon, groups
        )


def coupled_decay(config: RunConfig) -> list[Patch]:
    return [Patch(engine, "Optimizer", AdamWithL2)]


def late_learning_rate(config: RunConfig) -> list[Patch]:
    take_step = Optimizer.step

    def step(self: Optimizer, step: int, scale: float) -> None:
        take_step(self, max(0, step - 1), scale)

    return [Patch(Optimizer, "step", step)]


# ------------------------------------------------------------------------------------------ weights


def transposed_square_weight(config: RunConfig) -> list[Patch]:
    name = "block.0.attention.query.weight"

    def load(named: Iterable[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
        load_weights(named, {**arrays, name: np.ascontiguousarray(arrays[name].T)})

    return [Patch(engine, "load_weights", load)]


def untied_gradients(config: RunConfig) -> list[Patch]:
    def nothing(self: Any) -> None:
        pass

    return [
        Patch(PaddleEngine, "_add_tied_gradients", nothing),
        Patch(StageLayers, "allreduce_shared_weight_gradients", nothing),
    ]


# ------------------------------------------------------------------------------------------ dropout


def local_dropout_samples(config: RunConfig) -> list[Patch]:
    prepare_shared = Stage.prepare

    def prepare(self: Stage, micro_batch: int) -> None:
        prepare_shared(self, micro_batch)
        self._context.samples = self._samples[0]

    return [Patch(Stage, "prepare", prepare)]


def natively_drawn_dropout(config: RunConfig) -> list[Patch]:
    def dropout(x: Tensor, probability: float, site: int, context: DropoutContext) -> Tensor:
        return x if context.step_key is None else native_dropout(x, probability, site, context)

    return [Patch(layers, "dropout", dropout)]


def plain_dropout(config: RunConfig) -> list[Patch]:
    """`mode="downscale_in_infer"`: scaled down in evaluation instead of up in training."""

    def dropout(x: Tensor, probability: float, site: int, context: DropoutContext) -> Tensor:
        if context.step_key is None:
            return x * (1 - probability)
        return x * keep_mask(context, site, x.shape, probability).astype(x.dtype)

    return [Patch(layers, "dropout", dropout)]


HABITS: dict[str, Habit] = {
    "mean-over-all-labels": mean_over_all_labels,
    "clipped-loss": clipped_loss,
    "mean-per-micro-batch": mean_per_micro_batch,
    "unscaled-micro-batches": unscaled_micro_batches,
    "per-stage-clipping": per_stage_clipping,
    "default-weight-decay": with_train(weight_decay=0.01),
    "decay-everything": with_train(no_decay=()),
    "coupled-decay": coupled_decay,
    "default-betas": with_train(beta2=0.999),
    "late-learning-rate": late_learning_rate,
    "transposed-square-weight": transposed_square_weight,
    "local-dropout-samples": local_dropout_samples,
    "native-dropout": natively_drawn_dropout,
    "plain-dropout": plain_dropout,
    "untied-gradients": untied_gradients,
}
"""By their names in `common.spec.habits`."""
