"""The gradient of a parameter, for all who know that it is there.

Differs: only PyTorch keeps it on the parameter, where it may be None.
"""

from __future__ import annotations

from torch import Tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's `grad`, which `masters` or a baseline has made and nobody takes away.

    Raises RuntimeError for a parameter that no engine has placed.
    """
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {list(parameter.shape)} has no gradient yet")
    return parameter.grad
