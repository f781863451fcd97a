"""The Transformer's units in plain Paddle: `Embedding`, `Block`, `Head`. They know no pipeline.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.distributed import ReduceOp
from paddle.nn import functional

from common.spec.data import IGNORED
from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from paddle_impl.cache import Cache
from paddle_impl.dropout import DropoutContext, dropout
from paddle_impl.rounding import at_least_float32, in_dtype
from paddle_impl.shards import WHOLE, Shards, embed, row_linear
from paddle_impl.split_linear import Linear, tied_projection

_MASKED = -1e30
"""Added to the score of a later position: beside it every score vanishes, in float32 too."""


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU (Hendrycks and Gimpel 2016): 0.5 x (1 + erf(x / sqrt 2)).

    Differs: not written out: Paddle's kernel is this formula, in full precision and one pass.
    """
    return functional.gelu(x, approximate=False)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, GPT-2's: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return functional.gelu(x, approximate=True)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return what stands between a feed-forward's two layers (`TransformerSpec.activation`)."""
    known: dict[str, Callable[[Tensor], Tensor]]
    known = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": functional.relu}
    known["swiglu"] = functional.silu
    return known[name]


class _RMSNorm(nn.Layer):
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019).

    Differs: written out, since Paddle has no such layer, and its fused kernels none for CPUs.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        ones = nn.initializer.Constant(1.0)
        self.weight = self.create_parameter([spec.d_model], default_initializer=ones)
        self.epsilon = spec.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        scale = ((wide * wide).mean(-1, keepdim=True) + self.epsilon).sqrt()  # (B, S, 1)
        return in_dtype(wide / scale * self.weight, x.dtype)


def norm(spec: TransformerSpec) -> nn.Layer:
    """Return a norm of the model's kind."""
    if spec.norm_kind == "rms":
        return _RMSNorm(spec)
    return nn.LayerNorm(spec.d_model, spec.norm_epsilon, bias_attr=_bias(spec))


def _bias(spec: TransformerSpec) -> bool | None:
    """Paddle's word for a layer with a bias is None, for one without False."""
    return None if spec.biases else False


def rotate(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Turn feature i and i + E/2 of every head by the position's angle (B, H, S, E); the first
    position is `start`. The angles are rounded once from float64.
    """
    size, half = x.shape[2], x.shape[3] // 2
    positions = np.arange(start, start + size)[:, None]  # (S, 1)
    angles = positions * theta ** (-np.arange(half) / half)  # (S, E/2)
    wide = at_least_float32(x)
    cos, sin = (
        paddle.to_tensor(table).astype(wide.dtype) for table in (np.cos(angles), np.sin(angles))
    )
    a, b = wide.chunk(2, -1)
    return in_dtype(paddle.concat([a * cos - b * sin, b * cos + a * sin], -1), x.dtype)


class Embedding(nn.Layer):
    """Token embedding, plus a learned position embedding where positions are not rotary.

    Differs: it rounds what it has looked up to `dtype`, by default that of its weights, and all
    layers behind it compute in that.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        context: DropoutContext,
        shards: Shards = WHOLE,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(shards.tokens(spec.vocab_size), spec.d_model)
        self.position = (
            nn.Embedding(spec.context_length, spec.d_model) if spec.position == "learned" else None
        )
        self.dropout, self.context, self.shards = spec.dropout, context, shards
        self.dtype = getattr(paddle, dtype) if dtype else self.token.weight.dtype

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        x = in_dtype(embed(self.token, tokens, self.shards), self.dtype)  # (B, S, D)
        if self.position is not None:
            start = 0 if cache is None else cache.length
            places = paddle.arange(start, start + tokens.shape[1])
            x = x + in_dtype(self.position(places), self.dtype)
        return dropout(x, self.dropout, site_number("embedding", 0), self.context)

    @property
    def tied_weight(self) -> Tensor:
        """What a tied head shares, by the name that fleet's SharedLayerDesc looks for: (V, D)."""
        return self.token.weight


def causal_mask(size: int) -> Tensor:
    """(size, size), added to the scores: no token attends to a later one.

    Differs: finite, since FLAGS_check_nan_inf stops at any infinity. The weights are the same bits.
    """
    return paddle.full((size, size), _MASKED).triu(1)


def share_heads(x: Tensor, group: int) -> Tensor:
    """Repeat keys' or values' heads for their query groups: (B, K, S, E) to (B, H, S, E)."""
    return x.repeat_interleave(group, 1)


def scaled_products(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T / sqrt(E): (B, H, S, S)."""
    return paddle.matmul(q / math.sqrt(q.shape[-1]), k, transpose_y=True)


class Attention(nn.Layer):
    """Self-attention (Vaswani et al. 2017, section 3.2), with an additive mask if causal.

    The key has no bias: softmax cancels it (see `common.spec.run.TransformerSpec`). Where there are
    fewer heads of keys and values (K), a group of query heads shares each. Shards have some each.
    """

    def __init__(
        self, spec: TransformerSpec, site: int, context: DropoutContext, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        kv, bias = shards.part(spec.kv_heads) * spec.d_head, _bias(spec)  # K E
        self.query = Linear(spec.d_model, shards.part(spec.d_model), bias_attr=bias)
        self.key = Linear(spec.d_model, kv, bias_attr=False)
        self.value = Linear(spec.d_model, kv, bias_attr=bias)
        self.output = row_linear(spec.d_model, spec.d_model, bias, shards)
        self.shards = shards
        self.d_head, self.group = spec.d_head, spec.num_heads // spec.kv_heads
        self.rope_theta = spec.rope_theta if spec.position == "rotary" else None
        self.dropout, self.site, self.context = spec.dropout, site, context
        mask = causal_mask(spec.context_length) if spec.causal else None  # (S, S)
        self.register_buffer("causal", mask, persistable=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        b, s, _ = x.shape
        x = self.shards.enter(x)
        start = 0 if cache is None else cache.length

        def split(y: Tensor) -> Tensor:
            return y.reshape([b, s, -1, self.d_head]).transpose([0, 2, 1, 3])

        # (B, H, S, E), of keys and values (B, K, S, E)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.rope_theta is not None:
            q, k = rotate(q, self.rope_theta, start), rotate(k, self.rope_theta, start)
        if cache is not None:
            k, v = cache.extend(self.site, k, v)  # (B, K, start + S, E)
        if self.group > 1:
            k, v = share_heads(k, self.group), share_heads(v, self.group)  # (B, H, S, E)
        scores = scaled_products(q, k)  # (B, H, S, S), with a cache (B, H, S, start + S)
        if self.causal is not None and s > 1:  # a single new position sees all that is there
            scores = scores + in_dtype(self.causal[start : start + s, : start + s], scores.dtype)
        weights = dropout(
            functional.softmax(scores),
            self.dropout,
            self.site,
            self.context,
            (self.shards.shard, self.shards.count),
        )  # (B, H, S, S)
        mixed = paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([b, s, -1])  # (B, S, D)
        return self.output(mixed)


class FeedForward(nn.Layer):
    """Two linear layers with an activation between them; SwiGLU (Shazeer 2020) has a third, whose
    activation the first one's output is multiplied with.
    """

    def __init__(self, spec: TransformerSpec, shards: Shards = WHOLE) -> None:
        super().__init__()
        d, f, bias = spec.d_model, shards.part(spec.d_ff), _bias(spec)
        self.gate = Linear(d, f, bias_attr=bias) if spec.activation == "swiglu" else None
        self.up = Linear(d, f, bias_attr=bias)
        self.down = row_linear(spec.d_ff, d, bias, shards)
        self.shards = shards
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shards.enter(x)
        up = self.up(x)  # (B, S, F)
        # (B, S, F)
        active = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(active)


class Block(nn.Layer):
    """Attention and feed-forward, each with a residual and a norm before (pre) or after (post)."""

    def __init__(
        self, spec: TransformerSpec, name: str, context: DropoutContext, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        attention_weights, self.attention_site, self.feed_forward_site = (
            site_number(name, i) for i in range(3)
        )
        self.norm_1 = norm(spec)
        self.attention = Attention(spec, attention_weights, context, shards)
        self.norm_2 = norm(spec)
        self.feed_forward = FeedForward(spec, shards)
        self.pre_norm, self.dropout, self.context = spec.norm == "pre", spec.dropout, context

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            z = self.attention(y, cache)
            return dropout(z, self.dropout, self.attention_site, self.context)

        def feed(y: Tensor) -> Tensor:
            return dropout(self.feed_forward(y), self.dropout, self.feed_forward_site, self.context)

        if self.pre_norm:
            x = x + attend(self.norm_1(x))
            return x + feed(self.norm_2(x))  # (B, S, D)
        x = self.norm_1(x + attend(x))
        return self.norm_2(x + feed(x))  # (B, S, D)


class Head(nn.Layer):
    """The last norm (pre-norm models only) and the projection to the vocabulary.

    A tied head has a copy of the token embedding (V, D); fleet or the engine keeps both equal.
    """

    def __init__(self, spec: TransformerSpec, shards: Shards = WHOLE) -> None:
        super().__init__()
        self.norm = norm(spec) if spec.norm == "pre" else nn.Identity()
        self.tied, self.shards = spec.tied_head, shards
        size = shards.tokens(spec.vocab_size)
        if self.tied:
            self.tied_weight = self.create_parameter([size, spec.d_model])
        else:
            self.output = Linear(spec.d_model, size, bias_attr=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            x = x[:, -1]  # (B, D): nobody asks for what follows an earlier token
        x = self.norm(x)
        if self.shards.columns:
            x = self.shards.enter(x)
        # (B, S, V), with a cache (B, V)
        return tied_projection(x, self.tied_weight) if self.tied else self.output(x)


def build_unit(
    spec: TransformerSpec, name: str, context: DropoutContext, shards: Shards = WHOLE
) -> nn.Layer:
    """Return the unit of this canonical name, or a shard of it, still without its weights."""
    if name == "embedding":
        return Embedding(spec, context, shards)
    return Head(spec, shards) if name == "head" else Block(spec, name, context, shards)


def summed_loss(logits: Tensor, targets: Tensor, num_tokens: int, shards: Shards = WHOLE) -> Tensor:
    """Return the sum of the tokens' cross-entropies over `num_tokens`, those of the whole
    mini-batch that count. In float32 at least, also from bfloat16.

    So the losses and gradients of micro-batches add up, whatever their sizes. Logits (B, S, V),
    targets (B, S); where a target is IGNORED, loss and gradient are 0. Of shards each may have its
    columns alone: three numbers of a position travel instead of V (Shoeybi et al. 2019, section 3).

    Differs: one loss for both. Fleet's `ParallelCrossEntropy` crashes on CPUs.
    """
    wide = at_least_float32(logits)
    loss = _SummedCrossEntropy.apply(wide.flatten(0, 1), targets.flatten(), shards)
    return loss / num_tokens


class _SummedCrossEntropy(PyLayer):
    """The sum of log sum exp(logits) - logits[target] over the rows whose target is not IGNORED.

    Differs: written out, since Paddle's CPU kernels of softmax, log_softmax and cross_entropy clip
    `x - max` at -64: no loss exceeds 64 + log V. Holds one tensor of the logits' size, as the other
    frameworks' kernels do. (In attention the clip stays: a weight of exp(-64) = 1.6e-28 where 0 is
    right vanishes beside the others. tests/parity shows it.)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shards: Shards) -> Tensor:
        counts = (targets != IGNORED).unsqueeze(1)  # (N, 1)
        places, is_own = shards.places(targets.unsqueeze(1), logits.shape[1])  # (N, 1), (N, 1)
        own = is_own.astype(logits.dtype)
        largest = shards.over_tokens(logits.max(-1, keepdim=True), ReduceOp.MAX)  # (N, 1)
        shifted = logits - largest  # (N, V)
        picked = paddle.index_sample(shifted, places)  # (N, 1)
        exponentials = shifted.exp_()  # (N, V), in place as all that follows: it may be gigabytes
        sums = paddle.concat([exponentials.sum(-1, keepdim=True), picked * own], 1)
        totals, at_target = shards.over_tokens(sums).split(2, 1)  # (N, 1), (N, 1)
        weights = counts.astype(logits.dtype)  # (N, 1)
        at_targets = (picked.exp() / totals - own) * weights  # (N, 1)
        # (N, V)
        of_logits = exponentials.multiply_(weights / totals).put_along_axis_(places, at_targets, 1)
        ctx.save_for_backward(of_logits)
        return (totals.log() - at_target)[counts].sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (of_logits,) = ctx.saved_tensor()
        return of_logits * gradient, None
