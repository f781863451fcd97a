"""The gradient of a parameter, for all who know that it is there.

Differs: only PyTorch keeps it on the parameter, where it may be None.
"""

from __future__ import annotations

from torch import Tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's `grad`, which an engine has made. Raises RuntimeError without one."""
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {list(parameter.shape)} has no gradient yet")
    return parameter.grad
