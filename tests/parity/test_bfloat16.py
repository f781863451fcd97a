"""bfloat16 with float32 master weights: no framework errs much more than the best one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from common.harness.probes import Run, compare_probe, expected
from common.harness.zoo import NOISE, run_all
from common.oracle.limits import Comparison, relative_margins
from common.spec.run import FRAMEWORKS
from tests.parity.ladder import config

Judge = Callable[[str, str, Comparison], None]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run | str]:
    """By framework: its run, or why there is none."""
    configs = {
        f: config(f, 2, 4, "bfloat16", "tied", "pre", "gelu", "even", 0.1, steps=20)
        for f in FRAMEWORKS
    }
    folder = tmp_path_factory.mktemp("bfloat16")
    found = run_all(list(configs.values()), folder, math.inf)
    return {framework: found[one] for framework, one in configs.items()}


def comparison(framework: str, run: Run) -> Comparison:
    one = config(framework, 2, 4, "bfloat16", "tied", "pre", "gelu", "even", 0.1, steps=20)
    return compare_probe(run, expected(one, NOISE), "bfloat16")


# Not "framework": each is judged beside the others, so all run in one worker.
@pytest.mark.parametrize("mine", FRAMEWORKS)
def test_below_the_ceiling_and_near_the_best(
    mine: str, outcomes: dict[str, Run | str], judge: Judge
) -> None:
    outcome = outcomes[mine]
    if isinstance(outcome, str):
        # A refusal in one clear line, and nothing else.
        assert outcome.startswith("failed: ValueError: "), outcome
        pytest.skip(outcome)
    compared = {
        name: comparison(name, run) for name, run in outcomes.items() if isinstance(run, Run)
    }
    judge(mine, "bfloat16", compared[mine])
    if len(compared) < 2:
        pytest.skip(f"{mine} alone: nothing to be judged beside")
    errors = {name: each.errors() for name, each in compared.items()}
    margins = dict(zip(compared, relative_margins(list(errors.values())), strict=True))
    assert max(margins[mine].values()) <= 1, f"{margins[mine]} from {errors}"
