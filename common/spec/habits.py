"""The drift zoo: numerical habits in which frameworks differ, each of which can be put back.

Every implementation writes its model so that all three agree (docs/numerics.md). A `Drift` undoes
one such decision in one framework, the way that framework does it by default or the way its users
commonly get it wrong; `RunConfig.drift` names it and the implementation's `drift.py` does it. The
parity check must then fail, and first at the `place` that is named here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from common.spec.parameters import Check
from common.spec.run import FRAMEWORKS, LLAMA, Framework, TransformerSpec


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
    """Pattern (fnmatch) of the first tensor that differs: a unit, or a canonical parameter name."""
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


TABLE = """
habit                      frameworks               dtype    check           place
tanh-gelu                  tensorflow               float32  activation      block.0
    GELU by its tanh approximation
    of keras.ops.gelu
float32-gelu-constant      tensorflow               float64  activation      block.0
    GELU divided by a constant with 12 digits
    of tf.nn.gelu(approximate=False)
layer-norm-epsilon         tensorflow               float32  activation      block.0
    LayerNorm's epsilon 1e-3
    of keras.layers.LayerNormalization
adam-epsilon-hat           tensorflow               float64  optimizer_step  *
    Adam's epsilon 1e-7, before the bias correction
    of keras.optimizers.AdamW
sparse-embedding-gradient  tensorflow               float32  loss_curve      loss
    an embedding's gradient as rows with repetitions, in clipping and Adam
    of tf.gather
keras-momentum             tensorflow               float64  loss_curve      loss
    momentum that holds the learning rate
    of keras.optimizers.SGD
onednn                     tensorflow               float32  activation      *
    oneDNN's kernels
    of TF_ENABLE_ONEDNN_OPTS=1
mean-over-all-labels       tensorflow paddle        float32  loss            loss
    the loss divided by all labels, the ignored ones too
    of keras.losses, paddle's cross_entropy with ignore_index < 0
clipped-loss               paddle                   float64  loss_curve      loss
    log-softmax whose `x - max` ends at -64
    of paddle's cross_entropy and softmax on CPU
mean-per-micro-batch       all                      float32  loss            loss
    the mean of the micro-batches' means
    of reduction='mean'
unscaled-micro-batches     all                      float32  loss            loss
    micro-batch losses added, not divided by their number
    of loss.backward() in a loop
per-stage-clipping         all                      float64  optimizer_step  *
    every stage clips by the norm of its own gradients
    of clip_grad_norm_ on a stage's parameters
clip-epsilon               torch                    float64  optimizer_step  *
    clipping by c / (norm + 1e-6)
    of torch.nn.utils.clip_grad_norm_
default-weight-decay       all                      float32  optimizer_step  *weight
    the optimizer's own weight decay (0.01, Keras 0.004)
    of AdamW of each framework
decay-everything           all                      float64  optimizer_step  *
    weight decay on biases and norms as well
    of AdamW of each framework
coupled-decay              torch paddle             float32  optimizer_step  *weight
    weight decay added to the gradient (Adam with L2)
    of Adam(weight_decay=...) of torch and Paddle
default-betas              all                      float32  loss_curve      loss
    beta2 = 0.999
    of AdamW of each framework
unrounded-hyperparameters  torch                    float64  optimizer_step  *
    hyperparameters in double precision
    of torch.optim
late-learning-rate         all                      float32  loss_curve      loss
    the learning rate of the step before
    of scheduler.step() after optimizer.step(), one warm-up step off
transposed-square-weight   all                      float32  activation      block.0
    one square weight of the attention loaded transposed
    of nn.Linear stores (out, in)
inverted-attention-mask    torch                    float32  activation      block.0
    True taken for 'may not attend'
    of nn.MultiheadAttention against scaled_dot_product_attention
causal-encoder             all                      float32  activation      block.0
    an encoder that keeps the causal mask
moved-scale                all                      float32  activation      block.0
    1 / sqrt(E) on the product of queries and keys (TensorFlow: on the queries)
    of transformers' Llama and BERT (Keras' and Paddle's MultiHeadAttention: the queries)
neighbouring-rotary-pairs  all                      float32  activation      block.0
    rotary positions turn features 2i and 2i + 1, not i and i + E/2
    of paddle.incubate's fused_rotary_position_embedding, transformers' GPT-J
default-rotary-theta       all                      float32  activation      block.0
    rotary theta 10,000 where the model has 500,000
    of keras_hub's RotaryEmbedding, paddle.incubate's fused_rotary_position_embedding, transformers
float32-rotary-angles      all                      float64  activation      block.0
    rotary angles in float32
    of transformers' LlamaRotaryEmbedding
rms-norm-epsilon           torch tensorflow         float32  activation      block.0
    RMSNorm's own epsilon (1.2e-7, Keras 1e-6)
    of torch.nn.RMSNorm (finfo.eps), keras.layers.RMSNormalization
float32-rms-norm           all                      float64  activation      block.0
    RMSNorm in float32, cast back before it is scaled
    of transformers' LlamaRMSNorm
tiled-kv-heads             all                      float32  activation      block.0
    keys' and values' heads tiled (0 1 0 1), not repeated (0 0 1 1)
    of torch.Tensor.repeat, tf.tile, paddle.tile
swapped-swiglu             all                      float32  activation      block.0
    SwiGLU's two matrices loaded the other way round
    of glu of each framework: the second half is the gate
local-dropout-samples      all                      float32  activation      embedding
    dropout masks by the row of the micro-batch, not of the mini-batch
native-dropout             all                      float32  activation      embedding
    the framework's own dropout masks
    of each framework
plain-dropout              paddle                   float32  activation      embedding
    dropout that does not scale up what it keeps
    of mode='downscale_in_infer'
untied-gradients           all                      float32  gradient        embedding.token.weight
    a tied head's copy trained with its own gradient alone
tf32                       torch tensorflow         float32  activation      *
    matrix products in TF32
    of TensorFlow on GPU
"""
"""All that are known: fields of `Drift` (`all`: all three frameworks), below them the title, and
behind "of" whose default it is. per-stage-clipping shows in float64: Adam's first step does not
change with the gradient's scale, but for epsilon.
"""

TODAY = LLAMA | {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500_000.0}
"""A small Llama 3, one for all habits of its block: they share their baselines."""


def _shown_by(model: Mapping[str, Any], *needs: str) -> dict[str, Any]:
    return {"model": model, "needs": needs}


RAGGED = {"run": {"sequence_lengths": "random"}}
SHOWN_BY: Mapping[str, Mapping[str, Any]] = {
    "keras-momentum": {"train": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1}},
    "onednn": {"may_pass": "float32 sums in another order, which the limits are made for"},
    "mean-over-all-labels": RAGGED,
    # A rate so large that a loss exceeds 64 within a few steps.
    "clipped-loss": {
        "train": {"optimizer": "sgd", "learning_rate": 60.0, "weight_decay": 0, "warmup_steps": 0},
        "ladder_steps": 5,
    },
    "mean-per-micro-batch": RAGGED,
    "causal-encoder": _shown_by({"causal": False, "norm": "post"}, "causal"),
    "moved-scale": {"may_pass": "the same numbers, rounded elsewhere"},
    "neighbouring-rotary-pairs": _shown_by(TODAY, "position"),
    "default-rotary-theta": _shown_by(TODAY, "position", "rope_theta"),
    "float32-rotary-angles": _shown_by(TODAY, "position"),
    "rms-norm-epsilon": _shown_by(TODAY, "norm_kind"),
    "float32-rms-norm": _shown_by(TODAY, "norm_kind"),
    "tiled-kv-heads": _shown_by(TODAY, "num_kv_heads"),
    "swapped-swiglu": _shown_by(TODAY, "activation"),
    "local-dropout-samples": _shown_by({"dropout": 0.1}, "dropout"),
    "native-dropout": _shown_by({"dropout": 0.1}, "dropout"),
    "plain-dropout": _shown_by({"dropout": 0.1}, "dropout"),
    "untied-gradients": _shown_by({"tied_head": True}, "tied_head"),
    "tf32": {"run": {"device": "cuda"}},
}
"""What a habit needs to show, beyond the table: other fields of `Drift`."""


def _drifts() -> tuple[Drift, ...]:
    found: list[Drift] = []
    for line in TABLE.strip().splitlines()[1:]:
        if not line.startswith(" "):
            name, frameworks, dtype, check, place = re.split(r"\s{2,}", line)
            own = FRAMEWORKS if frameworks == "all" else frameworks.split()
            able, fails = cast(tuple[Framework, ...], tuple(own)), cast(Check, check)
            found.append(Drift(name, "", able, fails, place, "", dtype, **SHOWN_BY.get(name, {})))
        elif found[-1].title:
            found[-1] = replace(found[-1], default_of=line.strip().removeprefix("of "))
        else:
            found[-1] = replace(found[-1], title=line.strip())
    return tuple(found)


DRIFTS = _drifts()
"""All that are known; `by_name` finds one."""


def by_name(name: str) -> Drift:
    """Return the drift of this name. Raises KeyError for an unknown one."""
    return {drift.name: drift for drift in DRIFTS}[name]
