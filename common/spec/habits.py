"""The drift zoo: numerical habits in which frameworks differ, each of which can be put back, one at
a time.

Every implementation writes its model so that all three agree (docs/numerics.md). A `Drift` undoes
one such decision in one framework, the way that framework does it by default or the way its users
commonly get it wrong; `RunConfig.drift` names it and the implementation's `drift.py` does it. The
parity check must then fail, and first at the `place` that is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.spec.parameters import Check
from common.spec.run import LLAMA, Framework, TransformerSpec


@dataclass(frozen=True)
class Drift:
    """One numerical habit of a framework."""

    name: str
    title: str
    """What is done, in a few words."""
    frameworks: tuple[Framework, ...]
    """Where it can be switched on."""
    check: Check
    """The first check of the ladder that must fail."""
    place: str
    """Pattern (fnmatch) of the first tensor that differs: a unit for activations, a canonical
    parameter name else.
    """
    default_of: str = ""
    """The framework whose default it is; otherwise a common mistake."""
    dtype: str = "float32"
    """The precision in which it shows."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """What the model is for the habit to show, in the baseline too."""
    needs: tuple[str, ...] = ()
    """Those fields of `model` without which the habit changes nothing."""
    train: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    ladder_steps: int = 100
    """Steps of the loss-curve check: fewer if training soon magnifies every rounding."""
    may_pass: str = ""
    """Why it may change bits and stay within every limit; otherwise it must fail."""

    def lacks(self, model: TransformerSpec) -> str | None:
        """Return the first field that this model lacks for the habit to show; None if it has all.

        Numbers may be any but the default.
        """
        plain = TransformerSpec()
        for name in self.needs:
            value, shown = getattr(model, name), self.model[name]
            is_number = isinstance(shown, float | int) and not isinstance(shown, bool)
            if value == getattr(plain, name) if is_number else value != shown:
                return name
        return None


TODAY = LLAMA | {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500_000.0}
"""A small Llama 3, one for all habits of its block: they share their baselines."""
EVERYWHERE: tuple[Framework, ...] = ("torch", "tensorflow", "paddle")

DRIFTS: tuple[Drift, ...] = (
    Drift(
        "tanh-gelu",
        "GELU by its tanh approximation",
        ("tensorflow",),
        "activation",
        "block.0",
        "keras.ops.gelu",
    ),
    Drift(
        "float32-gelu-constant",
        "GELU divided by a constant with 12 digits",
        ("tensorflow",),
        "activation",
        "block.0",
        "tf.nn.gelu(approximate=False)",
        "float64",
    ),
    Drift(
        "layer-norm-epsilon",
        "LayerNorm's epsilon 1e-3",
        ("tensorflow",),
        "activation",
        "block.0",
        "keras.layers.LayerNormalization",
    ),
    Drift(
        "adam-epsilon-hat",
        "Adam's epsilon 1e-7, before the bias correction",
        ("tensorflow",),
        "optimizer_step",
        "*",
        "keras.optimizers.AdamW",
        "float64",
    ),
    Drift(
        "sparse-embedding-gradient",
        "an embedding's gradient as rows with repetitions, in clipping and Adam",
        ("tensorflow",),
        "loss_curve",
        "loss",
        "tf.gather",
    ),
    Drift(
        "keras-momentum",
        "momentum that holds the learning rate",
        ("tensorflow",),
        "loss_curve",
        "loss",
        "keras.optimizers.SGD",
        "float64",
        train={"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1},
    ),
    Drift(
        "onednn",
        "oneDNN's kernels",
        ("tensorflow",),
        "activation",
        "*",
        "TF_ENABLE_ONEDNN_OPTS=1",
        may_pass="float32 sums in another order, which the limits are made for",
    ),
    Drift(
        "mean-over-all-labels",
        "the loss divided by all labels, the ignored ones too",
        ("tensorflow", "paddle"),
        "loss",
        "loss",
        "keras.losses, paddle's cross_entropy with ignore_index < 0",
        run={"sequence_lengths": "random"},
    ),
    Drift(
        "clipped-loss",
        "log-softmax whose `x - max` ends at -64",
        ("paddle",),
        "loss_curve",
        "loss",
        "paddle's cross_entropy and softmax on CPU",
        "float64",
        train={"optimizer": "sgd", "learning_rate": 60.0, "weight_decay": 0.0, "warmup_steps": 0},
        ladder_steps=5,
    ),
    Drift(
        "mean-per-micro-batch",
        "the mean of the micro-batches' means",
        EVERYWHERE,
        "loss",
        "loss",
        "reduction='mean'",
        run={"sequence_lengths": "random"},
    ),
    Drift(
        "unscaled-micro-batches",
        "micro-batch losses added, not divided by their number",
        EVERYWHERE,
        "loss",
        "loss",
        "loss.backward() in a loop",
    ),
    Drift(
        "per-stage-clipping",
        "every stage clips by the norm of its own gradients",
        EVERYWHERE,
        "optimizer_step",
        "*",
        "clip_grad_norm_ on a stage's parameters",
        # Adam's first step does not change with the gradient's scale, but for epsilon
        dtype="float64",
    ),
    Drift(
        "clip-epsilon",
        "clipping by c / (norm + 1e-6)",
        ("torch",),
        "optimizer_step",
        "*",
        "torch.nn.utils.clip_grad_norm_",
        "float64",
    ),
    Drift(
        "default-weight-decay",
        "the optimizer's own weight decay (0.01, Keras 0.004)",
        EVERYWHERE,
        "optimizer_step",
        "*weight",
        "AdamW of each framework",
    ),
    Drift(
        "decay-everything",
        "weight decay on biases and norms as well",
        EVERYWHERE,
        "optimizer_step",
        "*",
        "AdamW of each framework",
        dtype="float64",
    ),
    Drift(
        "coupled-decay",
        "weight decay added to the gradient (Adam with L2)",
        ("torch", "paddle"),
        "optimizer_step",
        "*weight",
        "Adam(weight_decay=...) of torch and Paddle",
    ),
    Drift(
        "default-betas",
        "beta2 = 0.999",
        EVERYWHERE,
        "loss_curve",
        "loss",
        "AdamW of each framework",
    ),
    Drift(
        "unrounded-hyperparameters",
        "hyperparameters in double precision",
        ("torch",),
        "optimizer_step",
        "*",
        "torch.optim",
        "float64",
    ),
    Drift(
        "late-learning-rate",
        "the learning rate of the step before",
        EVERYWHERE,
        "loss_curve",
        "loss",
        "scheduler.step() after optimizer.step(), one warm-up step off",
    ),
    Drift(
        "transposed-square-weight",
        "one square weight of the attention loaded transposed",
        EVERYWHERE,
        "activation",
        "block.0",
        "nn.Linear stores (out, in)",
    ),
    Drift(
        "inverted-attention-mask",
        "True taken for 'may not attend'",
        ("torch",),
        "activation",
        "block.0",
        "nn.MultiheadAttention against scaled_dot_product_attention",
    ),
    Drift(
        "causal-encoder",
        "an encoder that keeps the causal mask",
        EVERYWHERE,
        "activation",
        "block.0",
        model={"causal": False, "norm": "post"},
        needs=("causal",),
    ),
    Drift(
        "moved-scale",
        "1 / sqrt(E) on the product of queries and keys (TensorFlow: on the queries)",
        EVERYWHERE,
        "activation",
        "block.0",
        "transformers' Llama and BERT (Keras' and Paddle's MultiHeadAttention: the queries)",
        may_pass="the same numbers, rounded elsewhere",
    ),
    Drift(
        "neighbouring-rotary-pairs",
        "rotary positions turn features 2i and 2i + 1, not i and i + E/2",
        EVERYWHERE,
        "activation",
        "block.0",
        "paddle.incubate's fused_rotary_position_embedding, transformers' GPT-J",
        model=TODAY,
        needs=("position",),
    ),
    Drift(
        "default-rotary-theta",
        "rotary theta 10,000 where the model has 500,000",
        EVERYWHERE,
        "activation",
        "block.0",
        "keras_hub's RotaryEmbedding, paddle.incubate's fused_rotary_position_embedding, "
        "transformers",
        model=TODAY,
        needs=("position", "rope_theta"),
    ),
    Drift(
        "float32-rotary-angles",
        "rotary angles in float32",
        EVERYWHERE,
        "activation",
        "block.0",
        "transformers' LlamaRotaryEmbedding",
        "float64",
        model=TODAY,
        needs=("position",),
    ),
    Drift(
        "rms-norm-epsilon",
        "RMSNorm's own epsilon (1.2e-7, Keras 1e-6)",
        ("torch", "tensorflow"),
        "activation",
        "block.0",
        "torch.nn.RMSNorm (finfo.eps), keras.layers.RMSNormalization",
        model=TODAY,
        needs=("norm_kind",),
    ),
    Drift(
        "float32-rms-norm",
        "RMSNorm in float32, cast back before it is scaled",
        EVERYWHERE,
        "activation",
        "block.0",
        "transformers' LlamaRMSNorm",
        "float64",
        model=TODAY,
        needs=("norm_kind",),
    ),
    Drift(
        "tiled-kv-heads",
        "keys' and values' heads tiled (0 1 0 1), not repeated (0 0 1 1)",
        EVERYWHERE,
        "activation",
        "block.0",
        "torch.Tensor.repeat, tf.tile, paddle.tile",
        model=TODAY,
        needs=("num_kv_heads",),
    ),
    Drift(
        "swapped-swiglu",
        "SwiGLU's two matrices loaded the other way round",
        EVERYWHERE,
        "activation",
        "block.0",
        "glu of each framework: the second half is the gate",
        model=TODAY,
        needs=("activation",),
    ),
    Drift(
        "local-dropout-samples",
        "dropout masks by the row of the micro-batch, not of the mini-batch",
        EVERYWHERE,
        "activation",
        "embedding",
        model={"dropout": 0.1},
        needs=("dropout",),
    ),
    Drift(
        "native-dropout",
        "the framework's own dropout masks",
        EVERYWHERE,
        "activation",
        "embedding",
        "each framework",
        model={"dropout": 0.1},
        needs=("dropout",),
    ),
    Drift(
        "plain-dropout",
        "dropout that does not scale up what it keeps",
        ("paddle",),
        "activation",
        "embedding",
        "mode='downscale_in_infer'",
        model={"dropout": 0.1},
        needs=("dropout",),
    ),
    Drift(
        "untied-gradients",
        "a tied head's copy trained with its own gradient alone",
        EVERYWHERE,
        "gradient",
        "embedding.token.weight",
        model={"tied_head": True},
        needs=("tied_head",),
    ),
    Drift(
        "tf32",
        "matrix products in TF32",
        ("torch", "tensorflow"),
        "activation",
        "*",
        "TensorFlow on GPU",
        run={"device": "cuda"},
    ),
)
"""All that are known; `by_name` finds one."""


def by_name(name: str) -> Drift:
    """Return the drift of this name. Raises KeyError for an unknown one."""
    return {drift.name: drift for drift in DRIFTS}[name]
