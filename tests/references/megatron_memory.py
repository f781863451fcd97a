"""Memory of Megatron-LM's Transformer by the formulas of Korthikanti et al. 2022.

"Reducing Activation Recomputation in Large Transformer Models", sections 4 and 5: for runs that
Triptych cannot start (sequence parallelism, thousands of GPUs), and to check our own counts.

    s b h a L     tokens, sequences of a micro-batch, width, heads, layers
    t p v         devices of tensor parallelism, stages, chunks per device

Bytes of a layer and micro-batch, in 16 bits with dropout, F = 4 h. Without anything (t = 1):

    34 sbh     16-bit tensors 32 (what `common.spec.activation_memory` counts as 8 bSD + 2 bSF),
               two dropout masks of a byte 2
    5 abss     the softmax' output 2, its dropout's mask 1 and output 2

Differs from what our engines hold: they also keep the norms' statistics (a few bytes a token, not
counted here); PyTorch's keeps masks in the run's dtype, and in bfloat16 the norms in float32;
TensorFlow's keeps four more tensors of (b, s, h). Embedding and head are not counted here. Paddle's
in 16 bits with dropout is exactly this plus statistics (tests/common/test_megatron_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recomputation = Literal["none", "sequence", "selective", "sequence+selective", "full"]
"""`sequence` is sequence parallelism, which shards what tensor parallelism alone repeats; selective
recomputation computes attention's scores again; full recomputation keeps a layer's input alone.
"""

BYTES_PER_PARAMETER = 18
"""Weights 2, gradients 4, master weights 4, AdamW's moments 8: as ours in bfloat16."""


@dataclass(frozen=True)
class MegatronModel:
    """A model on t x p GPUs, by the paper's letters."""

    s: int
    b: int
    h: int
    a: int
    L: int
    t: int = 1
    p: int = 1
    v: int = 1

    def layer_bytes(self, mode: Recomputation) -> float:
        """Return what one micro-batch holds in one layer of one GPU (Table 2)."""
        sbh, t = self.s * self.b * self.h, self.t
        scores = 5 * self.a * self.s / self.h
        return {
            "none": sbh * (10 + 24 / t + scores / t),
            "sequence": sbh / t * (34 + scores),
            "selective": sbh * (10 + 24 / t),
            "sequence+selective": 34 * sbh / t,
            "full": 2.0 * sbh,
        }[mode]

    def first_stage_bytes(self, mode: Recomputation, micro_batches: int) -> float:
        """Return the activations of a GPU of stage 0 at their fullest, under 1F1B (section 4.2.3).

        Its L/p layers hold p micro-batches, so as much as L layers hold of one, whatever p; when
        interleaved, 1 + (p - 1) / (p v) times that.
        """
        if self.v > 1:  # m is a multiple of p
            layers = self.L * (1 + (self.p - 1) / (self.p * self.v))
        else:
            layers = self.L / self.p * min(micro_batches, self.p)
        return layers * self.layer_bytes(mode)

    @property
    def parameter_bytes(self) -> float:
        """Weights, gradients and optimizer of the layers' 12 L h^2 parameters, per GPU."""
        return BYTES_PER_PARAMETER * 12 * self.L * self.h**2 / (self.t * self.p)
