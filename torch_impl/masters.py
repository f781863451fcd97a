"""float32 masters of weights in lower precision (Micikevicius et al. 2018).

Differs: TensorFlow's are made by its chunks (`tf_impl/keras_pipeline/chunk.py`), Paddle's are the
parameters themselves (`paddle_impl/rounding.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torch_impl.weights import NamedParameter


def masters(compute: Iterable[NamedParameter], dtype: torch.dtype) -> list[NamedParameter]:
    """Return the parameters that the optimizer updates, in `dtype`, with zero gradients: the given
    ones if they have it.

    Else each is a float32 master of a parameter in lower precision (Micikevicius et al. 2018), and
    its gradient is also the other's: the backward adds to a layer's in float32.
    """
    result = []
    for item in compute:
        weight = item.parameter
        if weight.dtype is not dtype:
            item = item._replace(parameter=nn.Parameter(weight.detach().to(dtype)))
            weight.grad_dtype = dtype  # else PyTorch refuses a gradient of another type
        item.parameter.grad = torch.zeros_like(item.parameter)
        weight.grad = item.parameter.grad
        result.append(item)
    return result
