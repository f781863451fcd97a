"""PyTorch's habits in the drift zoo."""

from __future__ import annotations

from typing import Any

import pytest

from common.harness.zoo import has_cuda
from common.spec.habits import DRIFTS
from common.spec.run import RunConfig
from tests.engines import habits_here
from torch_impl.drift import HABITS, switch
from torch_impl.engine import build_engine

NAMES = [drift.name for drift in DRIFTS if "torch" in drift.frameworks]


def test_the_zoo_has_all_habits() -> None:
    assert list(HABITS) == NAMES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return habits_here("torch", NAMES, tmp_path_factory.mktemp("zoo"), build_engine, switch)


@pytest.mark.parametrize("name", NAMES)
def test_a_habit_fails_the_ladder_where_the_zoo_says_and_its_baseline_passes(
    verdicts: dict[str, str], name: str
) -> None:
    assert verdicts[name] == ("needs CUDA" if name == "tf32" and not has_cuda() else "as expected")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"drift": "onednn"},
            r"^drift = onednn; expected for torch: one of mean-per-micro-batch, ",
        ),
        (
            {"drift": "clip-epsilon", "executor": "native"},
            r"^drift = clip-epsilon; executor = native has none, expected table$",
        ),
    ],
)
def test_a_habit_that_pytorch_does_not_have_is_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), switch(RunConfig(**run)):
        pass
