"""The gradient of a parameter, for all who know that it is there; and sums in the order of ranks.

Differs: only PyTorch keeps a gradient on its parameter, where it may be None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's `grad`, which an engine has made. Raises RuntimeError without one."""
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {list(parameter.shape)} has no gradient yet")
    return parameter.grad


def added(pieces: Sequence[Tensor]) -> Tensor:
    """Return the sum of the ranks' pieces, in their order."""
    first, *others = pieces
    return reduce(Tensor.add_, others, first.clone())
