"""The specification: a wrong value is refused with its name and what is expected."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from common.spec.run import PRESETS, RunConfig, TrainSpec, TransformerSpec, explain, preset


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"model": {"num_heads": 3}},
            ["num_heads = 3", "d_model = 64", "[1, 2, 4, 8, 16, 32, 64]"],
        ),
        ({"model": {"norm": "middle"}}, ["model.norm = 'middle'", "'pre' or 'post'"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout = 1.0", "less than 1"]),
        ({"model": {"d_modle": 8}}, ["model.d_modle = 8", "not permitted"]),
        (
            {"train": {"micro_batches": 17}},
            ["micro_batches = 17 is more than batch_size = 16", "expected 1 to 16"],
        ),
        ({"train": {"warmup_steps": 99}}, ["warmup_steps = 99", "0 to 20"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate = nan", "finite"]),
        (
            {"train": {"learning_rate": 1e-320}},
            ["train.learning_rate = 0.0", "greater than 0"],
        ),  # 0 in float32
        ({"train": {"beta1": 0.99999999999}}, ["train.beta1 = 1.0", "less than 1"]),
        (
            {"train": {"dtype": "float16"}},
            ["train.dtype = 'float16'", "'float32', 'float64' or 'bfloat16'"],
        ),
        ({"stages": 7}, ["stages x chunks = 7", "6 units", "at most 6"]),
        (
            {"partition": "2,2", "stages": 3},
            ["partition = (2, 2)", "2 increasing boundaries between 1 and 5"],
        ),
        ({"partition": "fair"}, ["partition", "even, balanced, or boundaries"]),
        ({"model": {"vocab_size": 500}}, ["vocab_size = 500", "256"]),
        ({"framework": "jax"}, ["framework = 'jax'", "'torch', 'tensorflow' or 'paddle'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    wrong: dict[str, object], said: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(wrong)
    text = explain(caught.value)
    assert all(part in text for part in said), text
    assert len(text.splitlines()) == 1


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TransformerSpec().d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = preset(name)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_hyperparameters_are_exact_in_float32() -> None:
    train = TrainSpec(
        learning_rate=0.1,
        weight_decay=0.1,
        beta1=0.9,
        warmup_steps=3,
        learning_rate_schedule="cosine",
    )
    values = [
        train.learning_rate,
        train.weight_decay,
        train.beta1,
        *(train.learning_rate_at(s) for s in range(20)),
    ]
    assert values == [float(np.float32(value)) for value in values]


def test_learning_rate_warms_up_then_falls() -> None:
    train = TrainSpec(steps=12, warmup_steps=4, learning_rate=1.0, learning_rate_schedule="linear")
    assert [train.learning_rate_at(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert train.learning_rate_at(8) == 0.5
    cosine = train.model_copy(update={"learning_rate_schedule": "cosine"})
    assert cosine.learning_rate_at(8) == pytest.approx(0.5)
    constant = train.model_copy(update={"learning_rate_schedule": "constant"})
    assert constant.learning_rate_at(11) == 1.0


def test_no_decay_list() -> None:
    train = TrainSpec()
    assert train.decays("block.0.attention.query.weight")
    assert not train.decays("block.0.attention.query.bias")
    assert not train.decays("head.norm.weight")
    assert not TrainSpec(weight_decay=0).decays("head.output.weight")
