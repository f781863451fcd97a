"""Compressed gradients in whole trainings: every framework against the oracle's own compressors,
and against itself, bit by bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest

from common.harness.probes import Run, losses_as_tensors
from common.harness.zoo import NOISE, run_all
from common.oracle.compression import ReplicatedOracle
from common.oracle.limits import Comparison, compare
from common.runtime.job import Job
from common.runtime.training import starting_weights
from common.spec.data import load_corpus
from common.spec.parameters import TensorKey, unit_of
from common.spec.run import FRAMEWORKS, RunConfig
from tests.parity.ladder import config, first_different_bits

KINDS = ("fp16", "powersgd:2", "topk:0.05", "ef-sign")
"""One of each kind; `tests.compression` has them all."""
STEPS = 6
CUTS = {"one stage": (1, "1f1b", 1), "two, a vee": (2, "zb-v", 2)}
ALSO_CUT = ("powersgd:2", "ef-sign")
"""Kinds that run with both cuts: a cut that changed what the others make, of each element or each
tensor alone, would change these too.
"""


def cuts(kind: str) -> list[str]:
    return [cut for cut in CUTS if cut == "one stage" or kind in ALSO_CUT]


def run_of(framework: str, kind: str, cut: str) -> RunConfig:
    """Two replicas of an uneven mini-batch, whose tied head has a copy of its own.

    Sequences are full: behind the end of one, gradients are 0 but for rounding, which has any sign.
    """
    p, schedule, chunks = CUTS[cut]
    one = (framework, p, 2, "float64", "tied", "pre", "gelu", "even", 0.1, schedule)
    found = config(*one, steps=STEPS, chunks=chunks, num_layers=2, batch_size=7, replicas=2)
    return found.model_copy(update={"compress": kind})


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[RunConfig, Run | str]]:
    """All runs of a framework, or why there is none."""

    @functools.cache
    def of(framework: str) -> dict[RunConfig, Run | str]:
        configs = [run_of(framework, kind, cut) for kind in KINDS for cut in cuts(kind)]
        return run_all(configs, tmp_path_factory.mktemp("compression"), math.inf)

    return of


@functools.cache
def expected(kind: str) -> tuple[dict[TensorKey, np.ndarray], list[float]]:
    """The oracle's compressed gradients of step 0, and its losses."""
    one = run_of("torch", kind, "one stage")
    oracle = ReplicatedOracle(one, starting_weights(Job(config=one, out="", noise=NOISE)))
    corpus, losses, first = load_corpus(one), [], {}
    for step in range(STEPS):
        losses.append(oracle.forward_backward(corpus.training_batch(one, step)))
        first = first or {
            TensorKey(0, "backward", 0, -1, unit_of(name), name): gradient.copy()
            for name, gradient in oracle.gradients.items()
        }
        oracle.apply_gradients(step)
    return first, losses


# Not "framework", which would start its whole ladder.
@pytest.mark.parametrize("mine", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_oracles_and_the_same_bits_however_it_is_cut(
    mine: str, kind: str, outcomes: Callable[[str], dict[RunConfig, Run | str]]
) -> None:
    """Here no value lies so near an edge that rounding decides, so float64's limits hold for all
    steps.
    """
    runs = []
    for cut in cuts(kind):
        outcome = outcomes(mine)[run_of(mine, kind, cut)]
        if isinstance(outcome, str):
            assert outcome.startswith("skipped: "), outcome
            pytest.skip(outcome)
        runs.append(outcome)
    gradients, losses = expected(kind)
    curves = map(losses_as_tensors, (runs[0].losses, losses))
    checks = (
        compare(runs[0].phase("backward"), gradients, "gradient", "float64"),
        compare(*curves, "loss_curve", "float64"),
    )
    comparison = Comparison(tuple(each for check in checks for each in check.differences))
    assert comparison.passed, comparison.report()
    assert losses[-1] < losses[0] - 0.1, "the run must learn, or its curve proves nothing"
    assert first_different_bits(runs[0], runs[-1], ("backward", "trained")) is None
