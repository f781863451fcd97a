"""Every framework against the oracle, tensor by tensor, and against itself, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.harness.probes import compare_probe
from common.oracle.limits import Comparison, compare
from common.schedule.generators import make_schedule
from common.schedule.simulate import simulate
from common.spec.memory import Memory
from common.spec.rules import TENSOR_PARALLEL
from common.spec.run import RunConfig
from tests.parity import ladder
from tests.parity.ladder import (
    CASES,
    EXTREME_NOISE,
    MODELS,
    Run,
    Runs,
    expected,
    first_different_bits,
)

Judge = Callable[[str, str, Comparison], None]

configs = ladder.configs

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _has_shards(request: pytest.FixtureRequest, framework: str) -> None:
    what = request.node.callspec.params.get("case") or request.node.callspec.params.get("model", "")
    if str(what).startswith("t") and framework not in TENSOR_PARALLEL:
        pytest.skip(f"{framework} has whole matrices")


@every_case
def test_against_the_oracle(framework: str, case: str, runs: Runs, judge: Judge) -> None:
    one, run = runs[case]
    want, dtype = expected(one), one.train.dtype
    judge(framework, dtype, compare_probe(run, want, dtype))
    assert want.losses[-1] < want.losses[0] - 0.3, "the run must learn, or its curve proves nothing"


@every_case
def test_executed_equals_planned(case: str, runs: Runs) -> None:
    assert_executed_equals_planned(*runs[case])


@every_case
def test_every_device_holds_what_is_predicted(case: str, runs: Runs) -> None:
    assert_holds_what_is_predicted(*runs[case])


def assert_holds_what_is_predicted(one: RunConfig, run: Run) -> None:
    predicted = [each.activations_bytes for each in Memory.of_run(one)]
    held = {d: count for part in run.parts for d, count in part.held_activation_peak_bytes.items()}
    assert held == dict(enumerate(predicted))


def assert_executed_equals_planned(one: RunConfig, run: Run) -> None:
    """Every action in its order, and as many micro-batches in flight as the simulator says."""
    schedule = make_schedule(one.schedule, one.stages, one.train.micro_batches, one.chunks)
    in_flight = {d: count for part in run.parts for d, count in part.in_flight_peak.items()}
    assert in_flight == dict(enumerate(simulate(schedule).peak_chunks_in_flight_per_stage))
    for step in (0, one.train.steps - 1):
        done = {
            device: [event.action for event in events]
            for part in run.parts
            for device, events in part.steps[step].events.items()
        }
        assert done == {
            device: list(map(str, actions)) for device, actions in enumerate(schedule.devices)
        }


@pytest.mark.parametrize("model", MODELS)
def test_every_schedule_and_partition_gives_the_same_bits(model: str, runs: Runs) -> None:
    variants = {
        name.split("/")[1]: each for name, each in runs.items() if name.startswith(f"{model}/")
    }
    for one, run in variants.values():
        assert_executed_equals_planned(one, run)
        assert_holds_what_is_predicted(one, run)
    first, few = variants["one-stage"], variants.pop("few", None)
    for one, run in (first, *([few] if few else [])):
        comparison = compare_probe(run, expected(one), one.train.dtype)
        assert comparison.passed, comparison.first_failure
    different = {name: first_different_bits(first.run, run) for name, (_, run) in variants.items()}
    assert not any(different.values()), {name: where for name, where in different.items() if where}


def test_logits_far_apart(framework: str, runs: Runs, judge: Judge) -> None:
    """Weights so large that logits and attention scores lie hundreds apart, at the limits of every
    other run.

    Where a kernel clips `x - max`, as Paddle's softmax does at -64, a loss above that shows it. In
    attention, where Paddle's kernel is used, nothing shows: beside a weight of 1 one of exp(-64)
    changes no bit.
    """
    one, run = runs["extreme"]
    want = expected(one, EXTREME_NOISE)
    assert min(want.losses) > 64, "a mean loss that no clipped kernel can have"
    judge(framework, "float64", compare_probe(run, want, "float64"))


@pytest.mark.parametrize("framework", ["torch"], indirect=True)
def test_a_wrong_model_fails_and_the_first_place_is_named(runs: Runs) -> None:
    """An epsilon of 1e-3 (Keras' default) instead of 1e-5: the first norm is in block 0."""
    one, run = runs["2-4-float64"]
    wrong = one.model_copy(update={"model": one.model.model_copy(update={"norm_epsilon": 1e-3})})
    comparison = compare(
        run.phase("forward"), expected(wrong).unit_outputs, "activation", "float64"
    )
    first = comparison.first_failure
    assert first is not None and first.key.unit == "block.0" and first.key.micro_batch == 0
