"""What a training computes, counted, and what cards can do at most: the two sides of MFU.

Model FLOPs utilization (Chowdhery et al. 2022, appendix B) is the share of a machine's matrix
products that a training uses for its model:

    MFU = tokens/s x model FLOPs per token / peak FLOP/s of all devices

Model FLOPs are what the mathematics needs, whatever a run does besides: activation recomputation is
not counted, so it lowers MFU as any other overhead does.
"""

from __future__ import annotations

import re

from common.spec.partition import unit_costs
from common.spec.run import RunConfig

BACKWARD = 2
"""Backward over forward: every product has two gradients, each a product of the same size."""


def model_flops_per_token(config: RunConfig) -> float:
    """Return the FLOPs of forward and backward per token of a sequence: 6 N + 12 L S D.

    N: the weights of all matrices that multiply (attention, feed-forward and head; no lookup, no
    bias, no norm). 12 L S D: attention's two products, with the masked half, which every
    implementation computes. A multiply-add is 2 FLOPs. Source: `unit_costs`.
    """
    forward = sum(cost.forward_flops for cost in unit_costs(config.model, config.train))
    tokens = config.train.micro_batch_size * config.model.context_length  # those of `unit_costs`
    return (1 + BACKWARD) * forward / tokens


PUBLISHED_TFLOPS = {
    "A100": {"bfloat16": 312.0, "float32": 19.5, "float64": 19.5},
    "H100 NVL": {"bfloat16": 835.0, "float32": 60.0, "float64": 60.0},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.0, "float64": 51.0},
    "H100": {"bfloat16": 989.0, "float32": 67.0, "float64": 67.0},
    "H200 NVL": {"bfloat16": 835.0, "float32": 60.0, "float64": 60.0},
    "H200": {"bfloat16": 989.0, "float32": 67.0, "float64": 67.0},
}
"""NVIDIA's data sheets, without sparsity. float32 without TF32, as the matched track computes;
float64 on tensor cores. A name's words are looked for in this order.
"""


def published_flops_per_second(card: str, dtype: str) -> float | None:
    """Return the figure of a card, such as `NVIDIA A100-SXM4-80GB`; None where it is not known.

    A slice of a card (MIG) has none.
    """
    words = set(re.split(r"[\s-]+", card.upper()))
    for name, tflops in PUBLISHED_TFLOPS.items():
        if words.issuperset(name.upper().split()) and "MIG" not in words:
            return tflops[dtype] * 1e12
    return None
