"""The Transformer's units in plain PyTorch: `Embedding`, `Block`, `Head`. They know nothing of
pipelines.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.spec.data import IGNORED
from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from torch_impl.dropout import DropoutContext, dropout
from torch_impl.precision import LayerNorm


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU (Hendrycks and Gimpel 2016): 0.5 x (1 + erf(x / sqrt 2)).

    Differs: not written out, since PyTorch's kernel is this formula with full-precision constants,
    in one pass.
    """
    return functional.gelu(x, approximate="none")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by the tanh approximation, which GPT-2 has: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715
    x^3))).
    """
    return functional.gelu(x, approximate="tanh")


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return what stands between the two linear layers of a feed-forward
    (`TransformerSpec.activation`).
    """
    return {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": functional.relu}[name]


class Embedding(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.token = nn.Embedding(spec.vocab_size, spec.d_model)
        self.position = nn.Embedding(spec.context_length, spec.d_model)
        self.dropout = spec.dropout
        self.register_buffer(
            "positions", torch.arange(spec.context_length), persistent=False
        )  # (S,)

    def forward(self, tokens: Tensor, context: DropoutContext | None) -> Tensor:
        x = self.token(tokens) + self.position(self.positions[: tokens.shape[1]])  # (B, S, D)
        return dropout(x, self.dropout, site_number("embedding", 0), context)


def causal_mask(size: int) -> Tensor:
    """(size, size), added to the scores: no token attends to a later one."""
    return torch.full((size, size), -math.inf).triu(1)


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2), with an additive mask.

    The key has no bias: softmax cancels it (see `common.spec.run.TransformerSpec`). `fused`: scores
    and softmax in one kernel that stores neither; it has no place for our dropout masks.
    """

    def __init__(self, spec: TransformerSpec, site: int, fused: bool) -> None:
        super().__init__()
        self.query = nn.Linear(spec.d_model, spec.d_model)
        self.key = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.value = nn.Linear(spec.d_model, spec.d_model)
        self.output = nn.Linear(spec.d_model, spec.d_model)
        self.num_heads, self.d_head = spec.num_heads, spec.d_head
        self.dropout, self.site, self.fused = spec.dropout, site, fused
        self.register_buffer("causal", causal_mask(spec.context_length), persistent=False)  # (S, S)

    def forward(self, x: Tensor, context: DropoutContext | None) -> Tensor:
        b, s, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, s, self.num_heads, self.d_head).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))  # (B, H, S, E)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, S, E)
        else:
            scores = (
                q / math.sqrt(self.d_head) @ k.transpose(-2, -1) + self.causal[:s, :s]
            )  # (B, H, S, S)
            weights = dropout(
                functional.softmax(scores, dim=-1), self.dropout, self.site, context
            )  # (B, H, S, S)
            mixed = weights @ v  # (B, H, S, E)
        return self.output(mixed.transpose(1, 2).reshape(b, s, d))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.d_model, spec.d_ff)
        self.down = nn.Linear(spec.d_ff, spec.d_model)
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # (B, S, F) between them


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm before (pre) or after
    (post) it.
    """

    def __init__(self, spec: TransformerSpec, name: str, fused: bool) -> None:
        super().__init__()
        attention_weights, self.attention_site, self.feed_forward_site = (
            site_number(name, i) for i in range(3)
        )
        self.norm_1 = LayerNorm(spec.d_model, spec.norm_epsilon)
        self.attention = Attention(spec, attention_weights, fused)
        self.norm_2 = LayerNorm(spec.d_model, spec.norm_epsilon)
        self.feed_forward = FeedForward(spec)
        self.pre_norm, self.dropout = spec.norm == "pre", spec.dropout

    def forward(self, x: Tensor, context: DropoutContext | None) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            return dropout(self.attention(y, context), self.dropout, self.attention_site, context)

        def feed(y: Tensor) -> Tensor:
            return dropout(self.feed_forward(y), self.dropout, self.feed_forward_site, context)

        if self.pre_norm:
            x = x + attend(self.norm_1(x))
            return x + feed(self.norm_2(x))  # (B, S, D)
        x = self.norm_1(x + attend(x))
        return self.norm_2(x + feed(x))  # (B, S, D)


class Head(nn.Module):
    """The last norm (pre-norm models only) and the projection to the vocabulary.

    A tied head has its own copy of the token embedding (V, D); the engine keeps both equal.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = (
            LayerNorm(spec.d_model, spec.norm_epsilon) if spec.norm == "pre" else nn.Identity()
        )
        self.output = nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    def forward(self, x: Tensor, context: DropoutContext | None) -> Tensor:
        return self.output(self.norm(x))  # (B, S, V)


def build_unit(spec: TransformerSpec, name: str, fused: bool = False) -> nn.Module:
    """Return the unit of this canonical name; its weights are still to be loaded. `fused` chooses
    the attention.
    """
    if name == "embedding":
        return Embedding(spec)
    if name == "head":
        return Head(spec)
    return Block(spec, name, fused)


def summed_loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """Return the sum of the tokens' cross-entropies over `num_tokens`, those of the whole
    mini-batch that count.

    So the losses and gradients of micro-batches add up, whatever their sizes; one whose targets are
    all IGNORED adds 0. Logits (B, S, V), targets (B, S). In float32 at least, also from bfloat16
    logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return losses / num_tokens
