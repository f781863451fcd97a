"""The sum of a chunk's gradients over its replicas, begun while the pipeline still computes.

Fleet has `fused_allreduce_gradients` for it, which its optimizer calls when the pass is over and
which divides by the number of replicas: it takes each one's loss for the mean of its own rows. Ours
is divided by the tokens of the whole mini-batch, so gradients are added up.

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
    """Starts on construction; `finish` puts the sums into the gradients, which must not change
    before.
    """

    @paddle.no_grad()
    def __init__(self, gradients: Sequence[Tensor], group: Group) -> None:
        self._gradients = gradients
        # One message for all: that of a norm's weight alone would be over sooner than begun.
        self._flat = paddle.concat([gradient.flatten() for gradient in gradients])  # (n,)
        self._task = paddle.distributed.all_reduce(self._flat, group=group, sync_op=False)

    @paddle.no_grad()
    def finish(self) -> None:
        """Wait for the other replicas; the gradients are then the sums, with equal bits on all."""
        self._task.wait()
        pieces = self._flat.split([gradient.size for gradient in self._gradients])
        for gradient, piece in zip(self._gradients, pieces, strict=True):
            gradient.copy_(piece.reshape(gradient.shape), True)
