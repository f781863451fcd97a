"""bfloat16 as most kernels have it: operands and results in bfloat16, what is between in float32.

Differs: of PyTorch 2.13's CPU kernels it is the backward of LayerNorm that is not so. It sums the
gradients of weight and bias over the rows in bfloat16: 9 and 14 roundoffs off after 2,048 rows, and
too small. On GPUs the kernel sums in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed in float32 where it would be bfloat16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), bias, self.eps
        ).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed in float32 where it would be bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16:
            return super().forward(x)
        weight = self.weight.float()
        return nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(
            x.dtype
        )
