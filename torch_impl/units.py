"""Units one after another as an ordinary module, for the baselines.

Differs: Paddle's baseline has a LayerList, TensorFlow's a Keras model
(`tf_impl/language_model.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.spec.run import RunConfig
from torch_impl import devices
from torch_impl.dropout import DropoutContext, ElementHashes
from torch_impl.layers import build_unit


class Units(nn.Module):
    """Consecutive units of the model: all of them, or those of a stage."""

    def __init__(self, config: RunConfig, part: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.part = part
        self.units = nn.ModuleList(
            build_unit(config.model, name, devices.fused_attention(config)) for name in part
        )
        self.to(device=device, dtype=getattr(torch, config.train.dtype))
        self.step_key: int | None = None
        """Of the dropout masks; None in evaluation."""
        self.outputs: list[tuple[str, Tensor]] | None = None
        """A list here makes `forward` keep every unit's output."""
        self._elements = ElementHashes()
        self._generator = (
            torch.Generator(device) if config.model.dropout_masks == "native" else None
        )

    def forward(self, x: Tensor, samples: Tensor) -> Tensor:
        context = None if self.step_key is None else self._dropout(self.step_key, samples)
        for name, unit in zip(self.part, self.units, strict=True):
            x = unit(x, context)
            if self.outputs is not None:
                self.outputs.append((name, x))
        return x

    def _dropout(self, key: int, samples: Tensor) -> DropoutContext:
        # Only PyTorch's own masks need it on the host, where reading it waits for a GPU.
        first = 0 if self._generator is None else int(samples[0])
        return DropoutContext(key, samples, first, self._elements, self._generator)
