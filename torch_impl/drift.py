"""The habits of `common.spec.habits` in PyTorch: each replaces one name of this package.

The rest of the package knows nothing of them: `switch` puts one in and takes it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import common.spec.run
from common.oracle.reference import clip_scale, global_norm
from common.runtime.habits import (
    Habit,
    attention_of,
    float32_rotary_angles,
    late_learning_rate,
    loaded_through,
    patch,
    replaced,
    swapped_swiglu,
    switched,
    transposed_square_weight,
    with_train,
)
from common.spec.data import IGNORED
from common.spec.run import RunConfig, TrainSpec
from torch_impl import engine, layers, optimizer, stage
from torch_impl.dropout import DropoutContext
from torch_impl.engine import PipelineEngine
from torch_impl.optimizer import StageOptimizer
from torch_impl.stage import Stage
from torch_impl.weights import NamedParameter

summed_loss, rotate, shared_dropout = layers.summed_loss, layers.rotate, Stage._dropout


def switch(config: RunConfig) -> AbstractContextManager[None]:
    """Return the habit that `config.drift` names, as a context. Raises ValueError for others."""
    return switched(config, "torch", HABITS, ("table",))


# --------------------------------------------------------------------------------------------- loss


def _own_mean(divisor: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The mean over the micro-batch's own tokens, divided by `divisor`; evaluation stays as it is."""  # noqa: E501

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        if not torch.is_grad_enabled():
            return summed_loss(logits, targets, num_tokens)
        return summed_loss(logits, targets, int((targets != IGNORED).sum()) * divisor)

    return loss


# ---------------------------------------------------------------------------------------- optimizer


def _per_stage_clipping(self: PipelineEngine, step: int) -> float:
    squares = self._on_all(lambda d: self._optimizers[d].squared_norms())
    scales = [clip_scale(global_norm(own), self.config.train.clip_norm) for own in squares]
    self._on_all(lambda d: self._optimizers[d].step(step, scales[d]))
    return global_norm([square for own in squares for square in own])


def _clip_epsilon(norm: float, clip_norm: float | None) -> float:
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))


def _unrounded_hyperparameters(config: RunConfig) -> list[AbstractContextManager[None]]:
    """What was meant by a hyperparameter is the double nearest to its first seven digits."""

    def exact(train: TrainSpec, named: Sequence[NamedParameter]) -> StageOptimizer:
        floats = {name: float(f"{value:.7g}") for name, value in train if isinstance(value, float)}
        return StageOptimizer(train.model_copy(update=floats), named)

    return [
        patch(engine, "StageOptimizer", exact),
        patch(common.spec.run, "round_to_float32", float),
    ]


# -------------------------------------------------------------------------------------------- model


def _inverted_attention_mask(size: int) -> Tensor:
    """Everything up to a token's own place is hidden; for the last that is all, so no infinity."""
    return torch.full((size, size), -1e9).tril()


def _moved_scale(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def _neighbouring_rotary_pairs(x: Tensor, *options: Any) -> Tensor:
    turned = rotate(torch.cat([x[..., ::2], x[..., 1::2]], -1), *options)
    return torch.stack(turned.chunk(2, -1), -1).flatten(-2)


def _float32_rotary_angles(x: Tensor, theta: float, *_: int) -> Tensor:
    tables = float32_rotary_angles(x.shape[2], x.shape[3] // 2, theta)
    cos, sin = (torch.from_numpy(table).to(x) for table in tables)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Float32RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        normal = nn.functional.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * normal.to(x.dtype)


# ------------------------------------------------------------------------------------------ dropout


def _local_dropout_samples(
    self: Stage, key: int, samples: Tensor, first_sample: int
) -> DropoutContext:
    return shared_dropout(self, key, samples - first_sample, 0)


def _native_dropout(self: Stage, key: int, samples: Tensor, first_sample: int) -> DropoutContext:
    own = torch.Generator(self.device)
    return shared_dropout(self, key, samples, first_sample)._replace(generator=own)


HABITS: dict[str, Habit] = {
    "mean-per-micro-batch": lambda config: [
        patch(stage, "summed_loss", _own_mean(config.train.micro_batches))
    ],
    "unscaled-micro-batches": replaced(stage, "summed_loss", _own_mean(1)),
    "per-stage-clipping": replaced(PipelineEngine, "apply_gradients", _per_stage_clipping),
    "clip-epsilon": replaced(engine, "clip_scale", _clip_epsilon),
    "default-weight-decay": with_train(engine, "StageOptimizer", weight_decay=0.01),
    "decay-everything": with_train(engine, "StageOptimizer", no_decay=()),
    "coupled-decay": replaced(optimizer, "AdamW", torch.optim.Adam),
    "default-betas": with_train(engine, "StageOptimizer", beta2=0.999),
    "unrounded-hyperparameters": _unrounded_hyperparameters,
    "late-learning-rate": late_learning_rate(optimizer),
    "transposed-square-weight": loaded_through(engine, transposed_square_weight),
    "inverted-attention-mask": replaced(layers, "causal_mask", _inverted_attention_mask),
    "causal-encoder": attention_of(layers, causal=True),
    "moved-scale": replaced(layers, "scaled_products", _moved_scale),
    "neighbouring-rotary-pairs": replaced(layers, "rotate", _neighbouring_rotary_pairs),
    "default-rotary-theta": attention_of(layers, rope_theta=10_000.0),
    "float32-rotary-angles": replaced(layers, "rotate", _float32_rotary_angles),
    "rms-norm-epsilon": replaced(layers, "norm", lambda spec: nn.RMSNorm(spec.d_model)),
    "float32-rms-norm": replaced(
        layers, "norm", lambda spec: _Float32RMSNorm(spec.d_model, spec.norm_epsilon)
    ),
    "tiled-kv-heads": replaced(layers, "share_heads", lambda x, group: x.repeat(1, group, 1, 1)),
    "swapped-swiglu": loaded_through(engine, swapped_swiglu),
    "local-dropout-samples": replaced(Stage, "_dropout", _local_dropout_samples),
    "native-dropout": replaced(Stage, "_dropout", _native_dropout),
    "untied-gradients": replaced(PipelineEngine, "_add_tied_gradients", lambda self: None),
    "tf32": replaced(torch.backends.cuda.matmul, "allow_tf32", True),
}
"""In the order of `common.spec.habits.DRIFTS`."""
