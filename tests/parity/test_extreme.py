"""Weights so large that logits and attention scores lie hundreds apart, at the limits of every other run.

Where a kernel clips `x - max`, as Paddle's softmax does at -64, a loss above that shows it. In attention, where Paddle's
kernel is used, nothing shows: beside a weight of 1 one of exp(-64) changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.parity import Comparison
from common.probes import compare_probe
from common.spec import FRAMEWORKS
from tests.parity.ladder import config, expected, run_probes

NOISE = 2.0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_logits_far_apart(framework: str, tmp_path: Path, judge: Callable[[str, str, Comparison], None]) -> None:
    one = config(framework, 2, 4, "float64", "untied", "pre", "gelu", "even", 0.0, steps=3, num_layers=2)
    want = expected(one, NOISE)
    assert min(want.losses) > 64, "a mean loss that no clipped kernel can have"
    judge(
        framework, "float64", compare_probe(run_probes({"extreme": one}, tmp_path, NOISE)["extreme"], want, "float64")
    )
