"""Compressed gradients in whole trainings: every framework against the oracle's own compressors,
and against itself, bit by bit.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from common.harness.probes import losses_as_tensors
from common.harness.zoo import NOISE
from common.oracle.compression import ReplicatedOracle
from common.oracle.limits import Comparison, compare
from common.runtime.job import Job
from common.runtime.training import starting_weights
from common.spec.data import load_corpus
from common.spec.parameters import TensorKey, unit_of
from common.spec.run import RunConfig
from tests.parity.ladder import Runs, config, first_different_bits

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


def configs(framework: str, folder: Path) -> dict[str, RunConfig]:
    return {f"{k}, {cut}": run_of(framework, k, cut) for k in KINDS for cut in cuts(k)}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_oracles_and_the_same_bits_however_it_is_cut(
    kind: str, runs: Runs
) -> None:
    """Here no value lies so near an edge that rounding decides, so float64's limits hold for all
    steps.
    """
    first, *others = (runs[f"{kind}, {cut}"].run for cut in cuts(kind))
    gradients, losses = expected(kind)
    curves = map(losses_as_tensors, (first.losses, losses))
    checks = (
        compare(first.phase("backward"), gradients, "gradient", "float64"),
        compare(*curves, "loss_curve", "float64"),
    )
    comparison = Comparison(tuple(each for check in checks for each in check.differences))
    assert comparison.passed, comparison.report()
    assert losses[-1] < losses[0] - 0.1, "the run must learn, or its curve proves nothing"
    for other in others:
        assert first_different_bits(first, other, ("backward", "trained")) is None
