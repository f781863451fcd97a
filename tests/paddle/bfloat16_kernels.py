"""What Paddle's CPU lacks in bfloat16 and its GPUs have: kernels whose operands and results are
bfloat16, with the arithmetic between in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle
import pytest
from paddle import Tensor
from paddle.nn import functional
from paddle.nn.layer import norm

MISSING: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (paddle, ("matmul",)),
    (functional, ("linear", "gelu", "silu", "relu", "softmax", "layer_norm")),
    (norm, ("layer_norm",)),  # which nn.LayerNorm calls
    (Tensor, ("__add__", "__radd__", "__sub__")),
)


def rounded(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `kernel` for bfloat16 too; float32 tensors beside one of bfloat16 stay as they are."""

    def is_low(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype == paddle.bfloat16

    def wide(x: Any) -> Any:
        return x.astype("float32") if is_low(x) else x

    @functools.wraps(kernel)
    def run(*arguments: Any, **named: Any) -> Tensor:
        if not any(map(is_low, (*arguments, *named.values()))):
            return kernel(*arguments, **named)
        result = kernel(*map(wide, arguments), **{name: wide(x) for name, x in named.items()})
        return result.astype("bfloat16")

    return run


def install(patch: pytest.MonkeyPatch) -> None:
    """Make them those of this process, for as long as `patch` lasts."""
    for owner, names in MISSING:
        for name in names:
            patch.setattr(owner, name, rounded(getattr(owner, name)))
