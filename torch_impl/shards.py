"""What the shards of a stage send each other, as operations of a layer; the picture is in
`common.spec.shards`.

    enter   f   forward: nothing                    backward: the sum of dx over the shards
    leave   g   forward: the sum over the shards    backward: nothing

Both are in B and F alone. What W multiplies, a layer's input and its output's gradient, each shard
has itself, so a split backward keeps its freedom: a row layer's bias is added behind the sum, and
the gradient of what comes out of it is what its weight and its bias want.

Between threads of one process (`torch_impl.shard_threads`) the same is exchanged in its memory.

Differs: TensorFlow's shards are devices of one graph, so that their sum is an addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from common.spec.data import IGNORED
from common.spec.run import RunConfig
from common.spec.shards import ShardSizes, own_tokens
from torch_impl.gradient_sum import OrderedSum


@dataclass(frozen=True)
class Shards(ShardSizes):
    """What one shard's layers know of the others: by default, that there are none."""

    count: int = 1
    shard: int = 0
    columns: tuple[int, ...] = ()
    group: Any = None

    def enter(self, x: Tensor) -> Tensor:
        """f, ahead of column layers: those that share it, as query, key and value, share a sum."""
        return x if self.count == 1 else _Enter.apply(x, self)  # type: ignore[no-untyped-call]

    def leave(self, x: Tensor) -> Tensor:
        """g, behind a row layer's product."""
        return x if self.count == 1 else _Leave.apply(x, self)  # type: ignore[no-untyped-call]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all shards' `x`, in their order: equal bits on each."""
        return OrderedSum(x.reshape(-1).clone(), self.group).finish().view_as(x)

    def gathered(self, x: Tensor) -> list[Tensor]:
        """Return all shards' `x`, of one shape."""
        found = [torch.empty_like(x) for _ in range(self.count)]
        distributed.all_gather(found, x.contiguous(), group=self.group)
        return found

    def whole(self, unit: str, output: Tensor) -> Tensor:
        """Return a unit's output: of the head's logits (B, S, V) each shard may have its columns
        alone.
        """
        if unit != "head" or not self.columns:
            return output
        padded = functional.pad(output.detach(), (0, max(self.columns) - output.shape[-1]))
        pieces = zip(self.gathered(padded), self.columns, strict=True)
        return torch.cat([piece[..., :columns] for piece, columns in pieces], -1)


WHOLE = Shards()


def columns_of(config: RunConfig) -> tuple[int, ...]:
    """Return `Shards.columns` of a run."""
    shards = range(config.tensor_parallel) if config.vocab_parallel else ()
    return tuple(len(own_tokens(config, shard)) for shard in shards)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.sum(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        return shards.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class RowLinear(nn.Linear):
    """A linear layer of which a shard has some of the input's features, and so a part of every sum;
    the bias is whole.
    """

    def __init__(self, features: int, out: int, bias: bool, shards: Shards) -> None:
        super().__init__(shards.part(features), out, bias)
        self.shards = shards

    def forward(self, x: Tensor) -> Tensor:
        y = self.shards.leave(functional.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


def row_linear(features: int, out: int, bias: bool, shards: Shards) -> nn.Linear:
    """Return a row layer; a plain one where there is one shard, whose kernel adds the bias too."""
    if shards.count == 1:
        return nn.Linear(features, out, bias)
    return RowLinear(features, out, bias, shards)


class OwnTokens(nn.Embedding):
    """The rows of a shard's tokens, which takes tokens of the whole vocabulary: what is held for W
    is then the mini-batch itself.
    """

    def __init__(self, vocab_size: int, features: int, shards: Shards) -> None:
        super().__init__(shards.tokens(vocab_size), features)
        self.first_token = shards.first_token

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.places(tokens))

    def places(self, tokens: Tensor) -> Tensor:
        """Return every token's row. Any will do for another shard's: its gradient is zeros."""
        return (tokens - self.first_token).clamp(0, self.num_embeddings - 1)


def token_embedding(vocab_size: int, features: int, shards: Shards) -> nn.Embedding:
    """Return the rows of the vocabulary, or of a shard's part of it."""
    if not shards.columns:
        return nn.Embedding(vocab_size, features)
    return OwnTokens(vocab_size, features, shards)


def embed(token: nn.Embedding, tokens: Tensor, shards: Shards) -> Tensor:
    """Return the tokens' rows (B, S, D). One that another shard has is zeros here until the sum."""
    rows: Tensor = token(tokens)  # (B, S, D)
    if not shards.columns:
        return rows
    here = tokens - shards.first_token
    outside = (here < 0) | (here >= token.num_embeddings)
    return shards.leave(rows.masked_fill(outside[..., None], 0))


def parallel_loss(logits: Tensor, targets: Tensor, num_tokens: int, shards: Shards) -> Tensor:
    """Return `layers.summed_loss` of logits (B, S, V) of which each shard has its columns.

    Shoeybi et al. 2019, section 3: three numbers of a position travel instead of V logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss: Tensor = _ParallelLoss.apply(logits, targets, shards)  # type: ignore[no-untyped-call]
    return loss / num_tokens


class _ParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shards: Shards) -> Tensor:
        here = targets - shards.first_token
        own = (here >= 0) & (here < logits.shape[-1])  # (B, S)
        column = torch.where(own, here, 0)[..., None]  # (B, S, 1)
        largest = logits.amax(-1)
        exps = (logits - largest[..., None]).exp().sum(-1)
        target = torch.where(own, logits.gather(-1, column)[..., 0], 0)
        found = torch.stack(shards.gathered(torch.stack([largest, exps, target])))  # (t, 3, B, S)
        top = found[:, 0].amax(0)  # (B, S)
        # In the order of the shards, as every sum over them.
        total, right = torch.zeros_like(top), torch.zeros_like(top)
        for largest, exps, target in found:
            total += exps * (largest - top).exp()
            right += target
        counts = targets != IGNORED
        ctx.save_for_backward(logits, top, total, column, own, counts)
        return torch.where(counts, total.log() + (top - right), 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, top, total, column, own, counts = ctx.saved_tensors
        found = (logits - top[..., None]).exp() / total[..., None]  # softmax
        found.scatter_add_(-1, column, -own[..., None].to(found.dtype))
        return found * (counts[..., None] * gradient), None, None
