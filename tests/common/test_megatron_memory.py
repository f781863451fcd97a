"""Korthikanti et al.'s formulas against their published figures, and against our own counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.spec.activation_memory import unit_held_bytes
from common.spec.memory import Memory
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from tests.references.megatron_memory import BYTES_PER_PARAMETER, MegatronModel

GOLDEN = Path(__file__).parents[1] / "golden" / "megatron_memory.json"
PUBLISHED = json.loads(GOLDEN.read_text(encoding="utf-8"))["models"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])
def test_figures_1_and_7(row: dict[str, Any]) -> None:
    model, m = MegatronModel(**row["model"]), row["micro_batches"]
    figure = dict(row["figure_1_gib"])
    assert model.parameter_bytes / 2**30 == pytest.approx(figure.pop("parameters"), abs=5e-5)
    for mode, gib in figure.items():
        assert model.first_stage_bytes(mode, m) / 2**30 == pytest.approx(gib, abs=5e-5)
    for mode, percent in row["figure_7_percent"].items():
        share = model.layer_bytes(mode) / model.layer_bytes("none")
        assert 100 * share == pytest.approx(percent, abs=0.2)


def test_fewer_micro_batches_than_stages_hold_less() -> None:
    model = MegatronModel(s=128, b=1, h=64, a=4, L=8, p=4)
    assert model.first_stage_bytes("none", 2) == model.first_stage_bytes("none", 8) / 2


def bfloat16_run(framework: str, t: int = 1) -> RunConfig:
    model = TransformerSpec(context_length=64, d_model=32, num_heads=4, d_ff=128, dropout=0.1)
    train = TrainSpec(dtype="bfloat16", batch_size=3, micro_batches=1)
    return RunConfig(framework=framework, stages=1, tensor_parallel=t, model=model, train=train)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_paddles_block_is_theirs_with_the_statistics_of_both_norms(t: int) -> None:
    theirs = MegatronModel(s=64, b=3, h=32, a=4, L=1, t=t).layer_bytes("none")
    ours = unit_held_bytes(bfloat16_run("paddle", t), "block.0", 3).forward
    assert ours - theirs == 4 * 4 * 3 * 64  # mean and deviation, 4 bytes each


def test_a_parameter_takes_as_many_bytes_as_ours() -> None:
    (device,) = Memory.of_run(bfloat16_run("torch"))
    held = device.weights_bytes + device.gradients_bytes + device.moments_bytes
    assert held == BYTES_PER_PARAMETER * device.parameters
