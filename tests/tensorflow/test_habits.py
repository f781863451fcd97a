"""TensorFlow's habits in the drift zoo; one that is a setting of the whole process is in
`tests/common/test_tf_zoo.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.harness.zoo import PROCESS_WIDE, has_cuda
from common.spec.habits import DRIFTS
from tests.engines import habits_here, small
from tf_impl.drift import HABITS, switch
from tf_impl.engine import build_engine

NAMES = [
    drift.name
    for drift in DRIFTS
    if "tensorflow" in drift.frameworks and drift.name not in PROCESS_WIDE
]


def test_the_zoo_has_all_habits() -> None:
    assert set(HABITS) == {*NAMES, *PROCESS_WIDE}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return habits_here("tensorflow", NAMES, tmp_path_factory.mktemp("zoo"), build_engine, switch)


@pytest.mark.parametrize("name", NAMES)
def test_a_habit_fails_the_ladder_where_the_zoo_says_and_its_baseline_passes(
    verdicts: dict[str, str], name: str
) -> None:
    assert verdicts[name] == ("needs CUDA" if name == "tf32" and not has_cuda() else "as expected")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"drift": "coupled-decay"},
            "drift = coupled-decay; expected for tensorflow: one of tanh-gelu",
        ),
        ({"drift": "tanh-gelu", "executor": "plain"}, "expected table"),
        ({"drift": "onednn"}, r"configure\(onednn=True\)"),
    ],
)
def test_a_habit_that_cannot_be_switched_on_is_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), switch(small("tensorflow", 1, run=run)):
        pass
