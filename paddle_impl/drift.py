"""The habits of `common.spec.habits` that Paddle has, each as what it replaces."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import functional

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
from common.spec.run import RunConfig
from paddle_impl import engine, layers, optimizer, stage
from paddle_impl.dropout import DropoutContext, keep_mask, native_dropout
from paddle_impl.engine import PipelineEngine
from paddle_impl.fleet import StageLayers
from paddle_impl.optimizer import StageOptimizer, _decay_groups
from paddle_impl.stage import Stage

rotate, prepare_shared = layers.rotate, Stage.prepare


def switch(config: RunConfig) -> AbstractContextManager[None]:
    """Return the habit that `config.drift` names, as a context. Raises ValueError for others."""
    return switched(config, "paddle", HABITS, ("table", "native"))


# --------------------------------------------------------------------------------------------- loss


def _mean_over_all_labels(config: RunConfig) -> list[AbstractContextManager[None]]:
    """Paddle's mean counts ignored labels too, where `ignore_index` is negative."""
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        flat = logits.flatten(0, 1), targets.flatten()
        return functional.cross_entropy(*flat, ignore_index=IGNORED) / m

    return [patch(stage, "summed_loss", loss)]


def _clipped_loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """Paddle's own kernel: on CPU no loss exceeds 64 + log V."""
    flat = logits.flatten(0, 1), targets.flatten()
    return functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / num_tokens


def _mean_per_micro_batch(config: RunConfig) -> list[AbstractContextManager[None]]:
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        return layers.summed_loss(logits, targets, max(1, (targets != IGNORED).sum().item())) / m

    return [patch(stage, "summed_loss", loss)]


def _unscaled_micro_batches(config: RunConfig) -> list[AbstractContextManager[None]]:
    m = config.train.micro_batches

    def loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        return layers.summed_loss(logits, targets, num_tokens) * m

    return [patch(stage, "summed_loss", loss)]


# ---------------------------------------------------------------------------------------- optimizer


def _own_squared_norms(self: PipelineEngine) -> list[float]:
    return list(self._optimizer.squared_norms().values())


class _AdamWithL2(StageOptimizer):
    """`paddle.optimizer.Adam(weight_decay=...)`: the decay goes through the moments."""

    def _build(self) -> paddle.optimizer.Optimizer:
        train = self._train
        groups = _decay_groups(train, self._named)
        return paddle.optimizer.Adam(
            train.learning_rate, train.beta1, train.beta2, train.epsilon, groups
        )


# ------------------------------------------------------------------------------------------- layers


def _moved_scale(q: Tensor, k: Tensor) -> Tensor:
    return paddle.matmul(q, k, transpose_y=True) / math.sqrt(q.shape[-1])


def _neighbouring_rotary_pairs(x: Tensor, *options: Any) -> Tensor:
    turned = rotate(paddle.concat([x[..., ::2], x[..., 1::2]], -1), *options)
    return paddle.stack(turned.chunk(2, -1), -1).flatten(-2)


def _float32_rotary_angles(x: Tensor, theta: float, *_: int) -> Tensor:
    tables = float32_rotary_angles(x.shape[2], x.shape[3] // 2, theta)
    cos, sin = (paddle.to_tensor(table).astype(x.dtype) for table in tables)
    a, b = x.chunk(2, -1)
    return paddle.concat([a * cos - b * sin, b * cos + a * sin], -1)


class _Float32RMSNorm(layers._RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        narrow = x.astype("float32")
        square = (narrow * narrow).mean(-1, keepdim=True)
        return self.weight * (narrow * (square + self.epsilon).rsqrt()).astype(x.dtype)


def _untied_gradients(config: RunConfig) -> list[AbstractContextManager[None]]:
    def nothing(self: Any) -> None:
        pass

    return [
        patch(PipelineEngine, "_add_tied_gradients", nothing),
        patch(StageLayers, "allreduce_shared_weight_gradients", nothing),
    ]


# ------------------------------------------------------------------------------------------ dropout


def _local_dropout_samples(self: Stage, micro_batch: int) -> None:
    prepare_shared(self, micro_batch)
    self._context.samples = self._samples[0]


def _native_dropout(
    x: Tensor, probability: float, site: int, context: DropoutContext, *part: tuple[int, int]
) -> Tensor:
    drops = context.step_key is not None
    return native_dropout(x, probability, site, context, *part) if drops else x


def _plain_dropout(
    x: Tensor, probability: float, site: int, context: DropoutContext, *part: tuple[int, int]
) -> Tensor:
    """`mode="downscale_in_infer"`: scaled down in evaluation instead of up in training."""
    if context.step_key is None:
        return x * (1 - probability)
    return x * keep_mask(context, site, x.shape, probability, *part).astype(x.dtype)


HABITS: dict[str, Habit] = {
    "mean-over-all-labels": _mean_over_all_labels,
    "clipped-loss": replaced(stage, "summed_loss", _clipped_loss),
    "mean-per-micro-batch": _mean_per_micro_batch,
    "unscaled-micro-batches": _unscaled_micro_batches,
    "per-stage-clipping": replaced(PipelineEngine, "_squared_norms", _own_squared_norms),
    "default-weight-decay": with_train(engine, "StageOptimizer", weight_decay=0.01),
    "decay-everything": with_train(engine, "StageOptimizer", no_decay=()),
    "coupled-decay": replaced(engine, "StageOptimizer", _AdamWithL2),
    "default-betas": with_train(engine, "StageOptimizer", beta2=0.999),
    "late-learning-rate": late_learning_rate(optimizer),
    "transposed-square-weight": loaded_through(engine, transposed_square_weight),
    "causal-encoder": attention_of(layers, causal=True),
    "moved-scale": replaced(layers, "scaled_products", _moved_scale),
    "neighbouring-rotary-pairs": replaced(layers, "rotate", _neighbouring_rotary_pairs),
    "default-rotary-theta": attention_of(layers, rope_theta=10_000.0),
    "float32-rotary-angles": replaced(layers, "rotate", _float32_rotary_angles),
    "float32-rms-norm": replaced(layers, "norm", _Float32RMSNorm),
    "tiled-kv-heads": replaced(layers, "share_heads", lambda x, group: x.tile([1, group, 1, 1])),
    "swapped-swiglu": loaded_through(engine, swapped_swiglu),
    "local-dropout-samples": replaced(Stage, "prepare", _local_dropout_samples),
    "native-dropout": replaced(layers, "dropout", _native_dropout),
    "plain-dropout": replaced(layers, "dropout", _plain_dropout),
    "untied-gradients": _untied_gradients,
}
"""By their names in `common.spec.habits`."""
