"""Units as programs that `paddle.jit.to_static` traces and merges, on the track "best".

Differs: PyTorch's best is a fused attention, TensorFlow's functions are traced on either track.
"""

from __future__ import annotations

from collections.abc import Iterable

import paddle
from paddle import nn

from common.schedule.generators import make_schedule
from common.spec.run import RunConfig
from paddle_impl.split_linear import merge_backward


def static_units(config: RunConfig) -> bool:
    """Return whether units run as traced programs: on the track "best", where they do the same in
    every forward and backward.

    Not with micro-batches of two sizes: once both are traced and another one follows (1f1b, sizes
    3, 2, 2), Paddle 3.3.1 gives wrong gradients for all that lies below the last program.
    """
    # A program would keep the masks of its first run; recomputation runs parts of it alone; shards
    # add up within; and fleet's own loop stays as its users have it.
    differs = (
        bool(config.model.dropout)
        or config.recompute != "none"
        or config.tensor_parallel > 1
        or config.train.dtype == "bfloat16"  # a program's linear layers round no weights
        or config.executor == "native"
    )
    # A program's backward is one operation, so B cannot leave W out.
    changes = config.executor == "table" and (
        not config.train.micro_batches_are_equal
        or make_schedule(
            config.schedule, config.stages, config.train.micro_batches, config.chunks
        ).splits_backward
    )
    return config.track == "best" and not differs and not changes


def make_static(units: Iterable[nn.Layer]) -> None:
    """Turn forwards into traced programs, backward included; they must not depend on a mask."""
    for unit in units:
        merge_backward(unit)  # what a PyLayer decides in its backward cannot be traced
        paddle.jit.to_static(unit)
