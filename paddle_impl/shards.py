"""What the shards of a stage send each other, as operations of a layer; the picture is in
`common.spec.shards`.

    enter   f   forward: nothing                    backward: the sum of dx over the shards
    leave   g   forward: the sum over the shards    backward: nothing

Both are in B and F alone. What W multiplies, a layer's input and its output's gradient, each shard
has itself, so a split backward keeps its freedom.

Differs: f and g are fleet's; TensorFlow's shards are devices of one graph. Fleet's layers around
the two, `ColumnParallelLinear` and `RowParallelLinear`, have our bits (`tests/paddle`), but each
column layer adds up dx by itself, and neither leaves W for later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed import ReduceOp
from paddle.distributed.fleet.layers.mpu import mp_ops

from common.spec.shards import ShardSizes
from paddle_impl.rounding import in_dtype
from paddle_impl.split_linear import Linear, linear


class Shards(ShardSizes):
    """What one shard's layers know of the others: by default, that there are none.

    Differs: no dataclass, since of one Paddle's tracer (`programs.py`) knows the fields alone.
    """

    def __init__(
        self, count: int = 1, shard: int = 0, columns: tuple[int, ...] = (), group: Any = None
    ) -> None:
        self.count, self.shard, self.columns, self.group = count, shard, columns, group

    def enter(self, x: Tensor) -> Tensor:
        """f, ahead of column layers: those that share it, as query, key and value, share a sum."""
        if self.count == 1:
            return x
        # Fleet's own copy of x has no CPU kernel. Without any, x itself would become f's result,
        # and what else goes on from x, as the residual connection does, would be added up too.
        return mp_ops._c_identity(x.clone(), self.group, skip_c_identity_dynamic=True)

    def leave(self, x: Tensor) -> Tensor:
        """g, behind a row layer's product, into which it puts the sum."""
        if self.count == 1:
            return x
        return mp_ops._mp_allreduce(x, group=self.group, skip_c_identity_dynamic=True)

    def places(self, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return which of the shard's `size` tokens each of `tokens` is, 0 for another's, and which
        are its own.
        """
        here = tokens - self.first_token
        own = (here >= 0) & (here < size)
        return here * own.astype(here.dtype), own

    def over_tokens(self, x: Tensor, operation: Any = ReduceOp.SUM) -> Tensor:
        """Put the sum over the parts of the vocabulary, or another reduction, into `x`."""
        if self.columns:
            paddle.distributed.all_reduce(x, operation, self.group)
        return x

    def joined(self, own: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """Return the whole of which each shard has a part, so large along `axis`."""
        pieces, shape = [], list(own.shape)
        for shard, rank in enumerate(self.group.ranks):
            shape[axis] = sizes[shard]
            piece = own if shard == self.shard else paddle.zeros(shape, own.dtype)
            paddle.distributed.broadcast(piece, rank, self.group)
            pieces.append(piece)
        return paddle.concat(pieces, axis)

    def whole(self, unit: str, output: Tensor) -> Tensor:
        """Return a unit's output: of the head's logits (B, S, V) each shard may have its columns
        alone.
        """
        if unit != "head" or not self.columns:
            return output
        return self.joined(output.detach(), output.ndim - 1, self.columns)


WHOLE = Shards()


class RowLinear(Linear):
    """A linear layer of which a shard has some of the input's features, and so a part of every sum;
    the bias is whole.
    """

    def __init__(self, features: int, out: int, bias: bool | None, shards: Shards) -> None:
        super().__init__(shards.part(features), out, bias_attr=bias)
        self.shards = shards

    def forward(self, x: Tensor) -> Tensor:
        y = self.shards.leave(linear(x, self.weight, None))
        return y if self.bias is None else y + in_dtype(self.bias, y.dtype)


def row_linear(features: int, out: int, bias: bool | None, shards: Shards) -> Linear:
    """Return a row layer; a plain one where there is one shard, whose kernel adds the bias too."""
    if shards.count == 1:
        return Linear(features, out, bias_attr=bias)
    return RowLinear(features, out, bias, shards)


def embed(token: nn.Embedding, tokens: Tensor, shards: Shards) -> Tensor:
    """Return the tokens' rows (B, S, D). One that another shard has is zeros here until the sum.

    Fleet's `VocabParallelEmbedding` fills its gradient with garbage on CPUs, in float64.
    """
    if not shards.columns:
        return token(tokens)
    places, own = shards.places(tokens, token.weight.shape[0])
    rows = token(places) * own.unsqueeze(-1).astype(token.weight.dtype)  # (B, S, D)
    return shards.leave(rows)
