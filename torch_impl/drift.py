"""The habits of `common.spec.habits` that PyTorch has or lets its users have: each replaces one
name of this package.

The rest of the package knows nothing of them: `switch` puts the replacement in place and takes it
away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import common.spec.run
from common.oracle.reference import clip_scale, global_norm
from common.spec.data import IGNORED
from common.spec.run import RunConfig, TrainSpec
from torch_impl import engine, layers, optimizer, stage
from torch_impl.dropout import DropoutContext
from torch_impl.engine import TorchEngine
from torch_impl.optimizer import StageOptimizer
from torch_impl.stage import Stage
from torch_impl.weights import NamedParameter

Patch = tuple[object, str, Any]
"""Whose attribute, which, and what it is for as long as the habit lasts."""

SQUARE_WEIGHT = "block.0.attention.query.weight"

summed_loss, load_weights, shared_dropout = layers.summed_loss, engine.load_weights, Stage._dropout


@contextmanager
def switch(config: RunConfig) -> Iterator[None]:
    """Put back the habit that `config.drift` names. Raises ValueError for one that PyTorch does not
    have.
    """
    patches: Sequence[Patch] = ()
    if config.drift is not None:
        if config.drift not in HABITS:
            raise ValueError(
                f"drift = {config.drift}; expected for torch: one of {', '.join(HABITS)}"
            )
        if config.executor != "table":
            raise ValueError(
                f"drift = {config.drift}; executor = {config.executor} has none, expected table"
            )
        patches = HABITS[config.drift](config)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for patch in patches:
            setattr(*patch)
        yield
    finally:
        for patch in before:
            setattr(*patch)


# --------------------------------------------------------------------------------------------- loss


def mean_per_micro_batch(config: RunConfig) -> list[Patch]:
    return [(stage, "summed_loss", _own_mean(config.train.micro_batches))]


def unscaled_micro_batches(config: RunConfig) -> list[Patch]:
    return [(stage, "summed_loss", _own_mean(1))]


def _own_mean(divisor: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The mean over the micro-batch's own tokens, divided by `divisor`; evaluation stays as it is."""  # noqa: E501

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        if not torch.is_grad_enabled():
            return summed_loss(logits, targets, num_tokens)
        return summed_loss(logits, targets, int((targets != IGNORED).sum()) * divisor)

    return loss


# ---------------------------------------------------------------------------------------- optimizer


def per_stage_clipping(config: RunConfig) -> list[Patch]:
    def apply_gradients(self: TorchEngine, step: int) -> float:
        squares = self._on_all(lambda d: self._optimizers[d].squared_norms())
        scales = [clip_scale(global_norm(own), config.train.clip_norm) for own in squares]
        self._on_all(lambda d: self._optimizers[d].step(step, scales[d]))
        return global_norm([square for own in squares for square in own])

    return [(TorchEngine, "apply_gradients", apply_gradients)]


def clip_epsilon(config: RunConfig) -> list[Patch]:
    def scale(norm: float, clip_norm: float | None) -> float:
        return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))

    return [(engine, "clip_scale", scale)]


def default_weight_decay(config: RunConfig) -> list[Patch]:
    return [(optimizer, "weight_decay", lambda train, name: 0.01 if train.decays(name) else 0.0)]


def decay_everything(config: RunConfig) -> list[Patch]:
    return [(optimizer, "weight_decay", lambda train, name: train.weight_decay)]


def coupled_decay(config: RunConfig) -> list[Patch]:
    return [(optimizer, "AdamW", torch.optim.Adam)]


def default_betas(config: RunConfig) -> list[Patch]:
    def adamw(groups: Any, betas: tuple[float, float], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=(betas[0], 0.999), **options)

    return [(optimizer, "AdamW", adamw)]


def unrounded_hyperparameters(config: RunConfig) -> list[Patch]:
    """Return a hyperparameter was written with few digits: the double nearest to its first seven is
    the one that was meant.
    """

    def exact(train: TrainSpec, named: Sequence[NamedParameter]) -> StageOptimizer:
        floats = {name: float(f"{value:.7g}") for name, value in train if isinstance(value, float)}
        return StageOptimizer(train.model_copy(update=floats), named)

    return [(engine, "StageOptimizer", exact), (common.spec.run, "round_to_float32", float)]


def late_learning_rate(config: RunConfig) -> list[Patch]:
    return [
        (optimizer, "learning_rate", lambda train, step: train.learning_rate_at(max(0, step - 1)))
    ]


# -------------------------------------------------------------------------------------------- model


def transposed_square_weight(config: RunConfig) -> list[Patch]:
    def load(named: Sequence[NamedParameter], arrays: Mapping[str, NDArray[Any]]) -> None:
        load_weights(named, {**arrays, SQUARE_WEIGHT: arrays[SQUARE_WEIGHT].T})

    return [(engine, "load_weights", load)]


def inverted_attention_mask(config: RunConfig) -> list[Patch]:
    """Everything up to a token's own place is hidden from it. For the last one that is all, hence
    no infinity.
    """

    def mask(size: int) -> Tensor:
        return torch.full((size, size), -1e9).tril()

    return [(layers, "causal_mask", mask)]


def local_dropout_samples(config: RunConfig) -> list[Patch]:
    def context(self: Stage, key: int, samples: Tensor, first_sample: int) -> DropoutContext:
        return shared_dropout(self, key, samples - first_sample, 0)

    return [(Stage, "_dropout", context)]


def native_dropout(config: RunConfig) -> list[Patch]:
    def context(self: Stage, key: int, samples: Tensor, first_sample: int) -> DropoutContext:
        return shared_dropout(self, key, samples, first_sample)._replace(
            generator=torch.Generator(self.device)
        )

    return [(Stage, "_dropout", context)]


def untied_gradients(config: RunConfig) -> list[Patch]:
    return [(TorchEngine, "_add_tied_gradients", lambda self: None)]


def tf32(config: RunConfig) -> list[Patch]:
    return [(torch.backends.cuda.matmul, "allow_tf32", True)]


HABITS: dict[str, Callable[[RunConfig], list[Patch]]] = {
    "mean-per-micro-batch": mean_per_micro_batch,
    "unscaled-micro-batches": unscaled_micro_batches,
    "per-stage-clipping": per_stage_clipping,
    "clip-epsilon": clip_epsilon,
    "default-weight-decay": default_weight_decay,
    "decay-everything": decay_everything,
    "coupled-decay": coupled_decay,
    "default-betas": default_betas,
    "unrounded-hyperparameters": unrounded_hyperparameters,
    "late-learning-rate": late_learning_rate,
    "transposed-square-weight": transposed_square_weight,
    "inverted-attention-mask": inverted_attention_mask,
    "local-dropout-samples": local_dropout_samples,
    "native-dropout": native_dropout,
    "untied-gradients": untied_gradients,
    "tf32": tf32,
}
"""In the order of `common.spec.habits.DRIFTS`."""
