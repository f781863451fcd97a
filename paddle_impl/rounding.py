"""bfloat16 as most kernels have it: operands and results in bfloat16, the arithmetic between in
float32. Parameters stay in float32, and a layer rounds those that it multiplies with.

Differs: so the parameters are their own masters, and Paddle adds up their gradients in float32.
PyTorch's autograd wants a gradient of its parameter's type, so there the two are apart
(`torch_impl/masters.py`).
"""

from __future__ import annotations

import paddle
from paddle import Tensor


def in_dtype(x: Tensor, dtype: paddle.dtype) -> Tensor:
    """`x` in `dtype`: itself, and no copy, if it has it."""
    return x if x.dtype == dtype else x.astype(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it is bfloat16."""
    return in_dtype(x, paddle.float32) if x.dtype == paddle.bfloat16 else x
