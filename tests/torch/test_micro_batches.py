"""Micro-batches of different sizes."""

from __future__ import annotations

import pytest

from common.spec.data import load_corpus
from common.spec.parameters import initial_weights
from common.spec.run import PRESETS, RunConfig, TrainSpec, TransformerSpec
from torch_impl.engine import PipelineEngine


def held_bytes(batch_size: int, schedule: str, recompute: str) -> int:
    """The most that one stage holds in a step with three micro-batches."""
    config = RunConfig(
        stages=1,
        schedule=schedule,
        recompute=recompute,
        device="cpu",
        threads=1,
        model=TransformerSpec(**PRESETS["tiny"]["model"]),
        train=TrainSpec(batch_size=batch_size, micro_batches=3),
    )
    engine = PipelineEngine(config)
    engine.reset(initial_weights(config.model, 0, "float32"))
    engine.forward_backward(load_corpus(config).training_batch(config, 0))
    engine.close()
    return engine.held_bytes_peak()[0]


@pytest.mark.parametrize("recompute", ["none", "every-1"])
def test_each_micro_batch_holds_what_its_size_needs(recompute: str) -> None:
    three, two = (held_bytes(3 * size, "gpipe", recompute) / 3 for size in (3, 2))
    assert three > two > 0
    assert held_bytes(8, "gpipe", recompute) == 2 * three + two
    # One at a time, the largest first.
    assert held_bytes(8, "zb-h1", recompute) == held_bytes(9, "zb-h1", recompute)
