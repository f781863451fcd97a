"""The sum of a chunk's gradients over its replicas, begun while the pipeline still computes.

Fleet has `fused_allreduce_gradients` for it, which its optimizer calls when the pass is over and
which divides by the number of replicas: it takes each one's loss for the mean of its own rows. Ours
is divided by the tokens of the whole mini-batch, so gradients are added up.

What replicas send may be rounded to a `wire` type of half the size, and so is the sum when it
travels. It is added in the gradients' own type, and here:

    rank 0   a0 a1 a2         a0+b0+c0                     all three slices
    rank 1   b0 b1 b2   ──►   a1+b1+c1               ──►   everywhere
    rank 2   c0 c1 c2         a2+b2+c2
             all-to-all       added in rank order    all-gather

Differs: our group over sockets adds in the order of the ranks itself (`sockets.py`), where gloo's
callers must. On GPUs the order is NCCL's: the same in every run, but with three replicas or more
perhaps not in every partition.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor
from paddle.distributed.communication.group import Group


class GradientSum:
    """Starts on construction; `finish` fills the gradients, which must not change before."""

    @paddle.no_grad()
    def __init__(self, gradients: Sequence[Tensor], group: Group, wire: str | None = None) -> None:
        self._gradients, self._group, self._wire = gradients, group, wire
        # One message for all: that of a norm's weight alone would be over sooner than begun.
        self._flat = paddle.concat([gradient.flatten() for gradient in gradients])  # (n,)
        if wire is None:
            self._task = paddle.distributed.all_reduce(self._flat, group=group, sync_op=False)
            return
        padding = -self._flat.size % group.nranks
        self._sent = self._packed(paddle.concat([self._flat, self._flat[:padding] * 0]))
        self._got = paddle.empty_like(self._sent)
        self._task = paddle.distributed.alltoall_single(
            self._got, self._sent, group=group, sync_op=False
        )

    @paddle.no_grad()
    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""
        self._task.wait()
        if self._wire is not None:
            rows = self._got.astype(self._flat.dtype).reshape([self._group.nranks, -1])
            total, *others = rows.unbind()  # (slice,) of each
            for other in others:
                total = total + other
            paddle.distributed.stream.all_gather(self._sent, self._packed(total), group=self._group)
            self._flat = self._sent.astype(self._flat.dtype)[: self._flat.size]
        pieces = self._flat.split([gradient.size for gradient in self._gradients])
        for gradient, piece in zip(self._gradients, pieces, strict=True):
            gradient.copy_(piece.reshape(gradient.shape), True)

    def _packed(self, values: Tensor) -> Tensor:
        # By way of float32, as every framework rounds.
        return values.astype("float32").astype(self._wire)
