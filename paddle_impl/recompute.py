"""Holding a piece's input alone between F and B: fleet's `recompute` (Chen et al. 2016; Huang et
al. 2019, section 2.3).

Differs: PyTorch's is a method of its chunks (`torch_impl/taps.py`), TensorFlow's is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.distributed.fleet.recompute import recompute as fleets_recompute


def recompute(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, of which only `x` is kept; the backward runs it again. `run` must give the same
    bits both times.

    Paddle's random state is not put back: what is random in `run` has to follow from its arguments.
    """
    if not x.stop_gradient:
        return fleets_recompute(run, x, preserve_rng_state=False)
    # Tokens have no gradient, and autograd runs nothing backwards that begins with them.
    anchor = paddle.zeros([1], "float32")  # 4 bytes, also in float64
    anchor.stop_gradient = False
    return fleets_recompute(lambda tokens, _: run(tokens), x, anchor, preserve_rng_state=False)
