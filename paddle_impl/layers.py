"""The Transformer's units in plain Paddle: `Embedding`, `Block`, `Head`. They know nothing of
pipelines.

Letters in shapes: B samples of a micro-batch, S positions, D width, H heads, E = D / H, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.nn import functional

from common.spec.data import IGNORED
from common.spec.dropout_masks import site_number
from common.spec.run import TransformerSpec
from paddle_impl.dropout import DropoutContext, dropout
from paddle_impl.split_linear import Linear, tied_projection

_MASKED = -1e30
"""Added to the score of a later position: beside it every score vanishes, in float32 too."""


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU (Hendrycks and Gimpel 2016): 0.5 x (1 + erf(x / sqrt 2)).

    Differs: not written out, since Paddle's kernel is this formula with full-precision constants,
    in one pass.
    """
    return functional.gelu(x, approximate=False)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by the tanh approximation, which GPT-2 has: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715
    x^3))).
    """
    return functional.gelu(x, approximate=True)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return what stands between the two linear layers of a feed-forward
    (`TransformerSpec.activation`).
    """
    known: dict[str, Callable[[Tensor], Tensor]]
    known = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": functional.relu}
    return known[name]


class Embedding(nn.Layer):
    """Token embedding plus learned position embedding."""

    def __init__(self, spec: TransformerSpec, context: DropoutContext) -> None:
        super().__init__()
        self.token = nn.Embedding(spec.vocab_size, spec.d_model)
        self.position = nn.Embedding(spec.context_length, spec.d_model)
        self.dropout, self.context = spec.dropout, context

    def forward(self, tokens: Tensor) -> Tensor:
        positions = paddle.arange(tokens.shape[1])  # (S,)
        x = self.token(tokens) + self.position(positions)  # (B, S, D)
        return dropout(x, self.dropout, site_number("embedding", 0), self.context)

    @property
    def tied_weight(self) -> Tensor:
        """What a tied head shares, by the name under which fleet's SharedLayerDesc looks for it:
        (V, D).
        """
        return self.token.weight


def causal_mask(size: int) -> Tensor:
    """(size, size), added to the scores: no token attends to a later one.

    Differs: finite, since FLAGS_check_nan_inf stops at any infinity. The weights are the same bits.
    """
    return paddle.full((size, size), _MASKED).triu(1)


class Attention(nn.Layer):
    """Causal self-attention (Vaswani et al. 2017, section 3.2), with an additive mask.

    The key has no bias: softmax cancels it (see `common.spec.run.TransformerSpec`).
    """

    def __init__(self, spec: TransformerSpec, site: int, context: DropoutContext) -> None:
        super().__init__()
        self.query = Linear(spec.d_model, spec.d_model)
        self.key = Linear(spec.d_model, spec.d_model, bias_attr=False)
        self.value = Linear(spec.d_model, spec.d_model)
        self.output = Linear(spec.d_model, spec.d_model)
        self.num_heads, self.d_head = spec.num_heads, spec.d_head
        self.dropout, self.site, self.context = spec.dropout, site, context
        self.register_buffer(
            "causal", causal_mask(spec.context_length), persistable=False
        )  # (S, S)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.reshape([b, s, self.num_heads, self.d_head]).transpose([0, 2, 1, 3])

        q = split(self.query(x)) / math.sqrt(self.d_head)  # (B, H, S, E)
        k, v = split(self.key(x)), split(self.value(x))  # (B, H, S, E)
        scores = paddle.matmul(q, k, transpose_y=True) + self.causal[:s, :s]  # (B, H, S, S)
        weights = dropout(
            functional.softmax(scores), self.dropout, self.site, self.context
        )  # (B, H, S, S)
        mixed = paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([b, s, d])  # (B, S, D)
        return self.output(mixed)


class FeedForward(nn.Layer):
    """Two linear layers with an activation between them."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.up = Linear(spec.d_model, spec.d_ff)
        self.down = Linear(spec.d_ff, spec.d_model)
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # (B, S, F) between them


class Block(nn.Layer):
    """Attention and feed-forward, each with a residual connection and a norm before (pre) or after
    (post) it.
    """

    def __init__(self, spec: TransformerSpec, name: str, context: DropoutContext) -> None:
        super().__init__()
        attention_weights, self.attention_site, self.feed_forward_site = (
            site_number(name, i) for i in range(3)
        )
        self.norm_1 = nn.LayerNorm(spec.d_model, spec.norm_epsilon)
        self.attention = Attention(spec, attention_weights, context)
        self.norm_2 = nn.LayerNorm(spec.d_model, spec.norm_epsilon)
        self.feed_forward = FeedForward(spec)
        self.pre_norm, self.dropout, self.context = spec.norm == "pre", spec.dropout, context

    def forward(self, x: Tensor) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            return dropout(self.attention(y), self.dropout, self.attention_site, self.context)

        def feed(y: Tensor) -> Tensor:
            return dropout(self.feed_forward(y), self.dropout, self.feed_forward_site, self.context)

        if self.pre_norm:
            x = x + attend(self.norm_1(x))
            return x + feed(self.norm_2(x))  # (B, S, D)
        x = self.norm_1(x + attend(x))
        return self.norm_2(x + feed(x))  # (B, S, D)


class Head(nn.Layer):
    """The last norm (pre-norm models only) and the projection to the vocabulary.

    A tied head has its own copy of the token embedding (V, D); fleet or the engine keeps both
    equal.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = (
            nn.LayerNorm(spec.d_model, spec.norm_epsilon) if spec.norm == "pre" else nn.Identity()
        )
        self.tied = spec.tied_head
        if self.tied:
            self.tied_weight = self.create_parameter([spec.vocab_size, spec.d_model])
        else:
            self.output = Linear(spec.d_model, spec.vocab_size, bias_attr=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return tied_projection(x, self.tied_weight) if self.tied else self.output(x)  # (B, S, V)


def build_unit(spec: TransformerSpec, name: str, context: DropoutContext) -> nn.Layer:
    """Return the unit of this canonical name; its weights are still to be loaded."""
    if name == "embedding":
        return Embedding(spec, context)
    return Head(spec) if name == "head" else Block(spec, name, context)


def summed_loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """Return the sum of the tokens' cross-entropies over `num_tokens`, those of the whole
    mini-batch that count.

    So the losses and gradients of micro-batches add up, whatever their sizes. Logits (B, S, V),
    targets (B, S); where a target is IGNORED, loss and gradient are 0.
    """
    return _SummedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten()) / num_tokens


class _SummedCrossEntropy(PyLayer):
    """The sum of log sum exp(logits) - logits[target] over the rows whose target is not IGNORED.

    Differs: written out, since Paddle's CPU kernels of softmax, log_softmax and cross_entropy clip
    `x - max` at -64: no loss exceeds 64 + log V. Holds one tensor of the logits' size, as the other
    frameworks' kernels do. (In attention the clip stays: a weight of exp(-64) = 1.6e-28 where 0 is
    right vanishes beside the others. tests/parity shows it.)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        counts = (targets != IGNORED).unsqueeze(1)  # (N, 1)
        places = targets.unsqueeze(1) * counts.astype(targets.dtype)  # (N, 1)
        shifted = logits - logits.max(-1, keepdim=True)  # (N, V)
        picked = paddle.index_sample(shifted, places)  # (N, 1)
        exponentials = shifted.exp_()  # (N, V), in place as all that follows: it may be gigabytes
        totals = exponentials.sum(-1, keepdim=True)  # (N, 1)
        weights = counts.astype(logits.dtype)  # (N, 1)
        at_targets = (picked.exp() / totals - 1) * weights  # (N, 1)
        of_logits = exponentials.multiply_(weights / totals).put_along_axis_(
            places, at_targets, 1
        )  # (N, V)
        ctx.save_for_backward(of_logits)
        return (totals.log() - picked)[counts].sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (of_logits,) = ctx.saved_tensor()
        return of_logits * gradient, None
