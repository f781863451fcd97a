"""The Transformer's units in plain PyTorch: `Embedding`, `Block`, `Head`. They know no pipeline.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.spec.data import IGNORED
from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from torch_impl.cache import Cache
from torch_impl.dropout import DropoutContext, dropout
from torch_impl.precision import LayerNorm, RMSNorm
from torch_impl.shards import WHOLE, Shards, embed, row_linear, token_embedding


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU (Hendrycks and Gimpel 2016): 0.5 x (1 + erf(x / sqrt 2)).

    Differs: not written out: PyTorch's kernel is this formula, in full precision and one pass.
    """
    return functional.gelu(x, approximate="none")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, GPT-2's: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return functional.gelu(x, approximate="tanh")


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return what stands between a feed-forward's two layers (`TransformerSpec.activation`)."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "relu": functional.relu,
        "swiglu": functional.silu,
    }
    return known[name]


def norm(spec: TransformerSpec) -> nn.Module:
    """Return a norm of the model's kind."""
    if spec.norm_kind == "rms":
        return RMSNorm(spec.d_model, spec.norm_epsilon)
    return LayerNorm(spec.d_model, spec.norm_epsilon, bias=spec.biases)


_ANGLES: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
"""Kept for all layers. Not buffers of them: those are rounded to bfloat16 with the weights."""


def constants() -> list[Tensor]:
    """Return what layers keep besides weights and buffers: no activation, whatever holds it."""
    return [table for tables in _ANGLES.values() for table in tables]


def _rotary_angles(
    size: int, width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (size, width / 2), rounded once from float64."""
    key = size, width, theta, dtype, device
    if key not in _ANGLES:
        half = width // 2
        turns = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(size, dtype=torch.float64)[:, None] * turns  # (S, E/2)
        _ANGLES[key] = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    return _ANGLES[key]


def rotate(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Turn features i and i + E/2 of (B, H, S, E) by the position's angle, from `start` on."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    end = start + x.shape[2]
    # Of few sizes, while a text grows by one token at a time.
    size = 1 << (end - 1).bit_length() if start else end
    cos, sin = (y[start:end] for y in _rotary_angles(size, x.shape[3], theta, dtype, x.device))
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Embedding(nn.Module):
    """Token embedding, plus a learned position embedding where positions are not rotary."""

    positions: Tensor  # (S,)

    def __init__(self, spec: TransformerSpec, shards: Shards = WHOLE) -> None:
        super().__init__()
        self.token = token_embedding(spec.vocab_size, spec.d_model, shards)
        self.shards = shards
        self.position = (
            nn.Embedding(spec.context_length, spec.d_model) if spec.position == "learned" else None
        )
        self.dropout = spec.dropout
        self.register_buffer("positions", torch.arange(spec.context_length), persistent=False)

    def forward(
        self, tokens: Tensor, context: DropoutContext | None, cache: Cache | None = None
    ) -> Tensor:
        x = embed(self.token, tokens, self.shards)  # (B, S, D)
        if self.position is not None:
            start = 0 if cache is None else cache.length
            x = x + self.position(self.positions[start : start + tokens.shape[1]])
        return dropout(x, self.dropout, site_number("embedding", 0), context)


def causal_mask(size: int) -> Tensor:
    """(size, size), added to the scores: no token attends to a later one."""
    return torch.full((size, size), -math.inf).triu(1)


def share_heads(x: Tensor, group: int) -> Tensor:
    """Repeat keys' or values' heads for their query groups: (B, K, S, E) to (B, H, S, E)."""
    return x.repeat_interleave(group, dim=1)


def scaled_products(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T / sqrt(E): (B, H, S, S)."""
    return q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017, section 3.2), with an additive mask if causal.

    The key has no bias: softmax cancels it (see `common.spec.run.TransformerSpec`). Where there are
    fewer heads of keys and values (K), a group of query heads shares each. `fused`: scores and
    softmax in one kernel that stores neither; it has no place for our dropout masks. Shards have
    some of the heads each.
    """

    causal: Tensor | None  # (S, S)

    def __init__(
        self, spec: TransformerSpec, site: int, fused: bool, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        kv = shards.part(spec.kv_heads) * spec.d_head  # K E
        self.query = nn.Linear(spec.d_model, shards.part(spec.d_model), spec.biases)
        self.key = nn.Linear(spec.d_model, kv, bias=False)
        self.value = nn.Linear(spec.d_model, kv, spec.biases)
        self.output = row_linear(spec.d_model, spec.d_model, spec.biases, shards)
        self.shards = shards
        self.d_head, self.group = spec.d_head, spec.num_heads // spec.kv_heads
        self.rope_theta = spec.rope_theta if spec.position == "rotary" else None
        self.dropout, self.site, self.fused = spec.dropout, site, fused
        # Once for the longest sequence: shorter ones, and a cache, take a part of it.
        mask = causal_mask(spec.context_length) if spec.causal else None
        self.register_buffer("causal", mask, persistent=False)

    def forward(
        self, x: Tensor, context: DropoutContext | None, cache: Cache | None = None
    ) -> Tensor:
        b, s, _ = x.shape
        x = self.shards.enter(x)
        start = 0 if cache is None else cache.length

        def split(y: Tensor) -> Tensor:
            return y.view(b, s, -1, self.d_head).transpose(1, 2)

        # (B, H, S, E), of keys and values (B, K, S, E)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.rope_theta is not None:
            q, k = rotate(q, self.rope_theta, start), rotate(k, self.rope_theta, start)
        if cache is not None:
            k, v = cache.extend(self.site, k, v)  # (B, K, start + S, E)
        if self.group > 1:
            k, v = share_heads(k, self.group), share_heads(v, self.group)  # (B, H, S, E)
        if self.fused:
            # With a cache one new position sees all that is there: no mask.
            mixed = functional.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal is not None and start == 0
            )  # (B, H, S, E)
        else:
            scores = scaled_products(q, k)  # (B, H, S, S), with a cache (B, H, S, start + S)
            if self.causal is not None and s > 1:  # a single new position sees all that is there
                scores = scores + self.causal[start : start + s, : start + s]
            weights = dropout(
                functional.softmax(scores, dim=-1),
                self.dropout,
                self.site,
                context,
                (self.shards.shard, self.shards.count),
            )  # (B, H, S, S)
            mixed = weights @ v  # (B, H, S, E)
        y: Tensor = self.output(mixed.transpose(1, 2).reshape(b, s, -1))  # (B, S, D)
        return y


class FeedForward(nn.Module):
    """Two linear layers with an activation between them; SwiGLU (Shazeer 2020) has a third, whose
    activation the first one's output is multiplied with.
    """

    def __init__(self, spec: TransformerSpec, shards: Shards = WHOLE) -> None:
        super().__init__()
        gated, features = spec.activation == "swiglu", shards.part(spec.d_ff)
        self.gate = nn.Linear(spec.d_model, features, spec.biases) if gated else None
        self.up = nn.Linear(spec.d_model, features, spec.biases)
        self.down = row_linear(spec.d_ff, spec.d_model, spec.biases, shards)
        self.shards = shards
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shards.enter(x)
        up = self.up(x)  # (B, S, F)
        # (B, S, F)
        active = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        y: Tensor = self.down(active)
        return y


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a norm before (pre) or after (post)."""

    def __init__(
        self, spec: TransformerSpec, name: str, fused: bool, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        attention_weights, self.attention_site, self.feed_forward_site = (
            site_number(name, i) for i in range(3)
        )
        self.norm_1 = norm(spec)
        self.attention = Attention(spec, attention_weights, fused, shards)
        self.norm_2 = norm(spec)
        self.feed_forward = FeedForward(spec, shards)
        self.pre_norm, self.dropout = spec.norm == "pre", spec.dropout

    def forward(
        self, x: Tensor, context: DropoutContext | None, cache: Cache | None = None
    ) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            z = self.attention(y, context, cache)
            return dropout(z, self.dropout, self.attention_site, context)

        def feed(y: Tensor) -> Tensor:
            return dropout(self.feed_forward(y), self.dropout, self.feed_forward_site, context)

        if self.pre_norm:
            x = x + attend(self.norm_1(x))
            return x + feed(self.norm_2(x))  # (B, S, D)
        x = self.norm_1(x + attend(x))
        x = self.norm_2(x + feed(x))
        return x  # (B, S, D)


class Head(nn.Module):
    """The last norm (pre-norm models only) and the projection to the vocabulary.

    A tied head has its own copy of the token embedding (V, D); the engine keeps both equal.
    """

    def __init__(self, spec: TransformerSpec, shards: Shards = WHOLE) -> None:
        super().__init__()
        self.norm = norm(spec) if spec.norm == "pre" else nn.Identity()
        self.output = nn.Linear(spec.d_model, shards.tokens(spec.vocab_size), bias=False)
        self.shards = shards

    def forward(
        self, x: Tensor, context: DropoutContext | None, cache: Cache | None = None
    ) -> Tensor:
        if cache is not None:
            x = x[:, -1]  # (B, D): nobody asks for what follows an earlier token
        x = self.norm(x)
        if self.shards.columns:
            x = self.shards.enter(x)
        logits: Tensor = self.output(x)  # (B, S, V), with a cache (B, V)
        return logits


def build_unit(
    spec: TransformerSpec, name: str, fused: bool = False, shards: Shards = WHOLE
) -> nn.Module:
    """Return the unit of this canonical name, or a shard of it; its weights are still to be loaded.
    `fused` chooses the attention.
    """
    if name == "embedding":
        return Embedding(spec, shards)
    if name == "head":
        return Head(spec, shards)
    return Block(spec, name, fused, shards)


def summed_loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """Return the sum of the tokens' cross-entropies over `num_tokens`, those of the whole
    mini-batch that count.

    So the losses and gradients of micro-batches add up, whatever their sizes; one whose targets are
    all IGNORED adds 0. Logits (B, S, V), targets (B, S). In float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return losses / num_tokens
