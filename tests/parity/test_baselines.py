"""The baselines and the track "best" against the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.harness.probes import compare_probe
from common.schedule.generators import make_schedule
from common.spec.rules import why_impossible
from common.spec.run import RunConfig
from tests.parity.ladder import Runs, config, expected

STAGES, MICRO_BATCHES, STEPS = 2, 4, 10

BASELINES: dict[str, tuple[str, str, str, float, str, int]] = {
    "plain": ("plain", "tied", "float32", 0.1, "1f1b", 1),
    "plain-float64": ("plain", "untied", "float64", 0.0, "1f1b", 1),
    "native": ("native", "untied", "float32", 0.1, "1f1b", 1),
    "native-tied": ("native", "tied", "float64", 0.0, "1f1b", 1),
    "native-gpipe": ("native", "untied", "float32", 0.0, "gpipe", 1),
    "native-interleaved": ("native", "untied", "float32", 0.0, "interleaved", 2),
    "native-zb-h1": ("native", "untied", "float64", 0.1, "zb-h1", 1),
    "native-zb-v": ("native", "tied", "float32", 0.0, "zb-v", 2),
}
"""name: (executor, head, dtype, dropout, schedule, chunks)"""

BEST = ("best", "best-plain")
OWN_SCHEDULES = {
    "torch": ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"),
    "paddle": ("1f1b",),
    "tensorflow": (),
}


def has(framework: str, name: str) -> bool:
    executor, *_, schedule, _ = BASELINES[name]
    return executor == "plain" or schedule in OWN_SCHEDULES[framework]


def run_config(
    framework: str, executor: str, head: str, dtype: str, dropout: float, schedule: str, chunks: int
) -> RunConfig:
    stages = 1 if executor == "plain" else STAGES
    return config(
        framework, stages, MICRO_BATCHES, dtype, head, "pre", "gelu", "even", dropout,
        schedule, steps=STEPS, chunks=chunks, executor=executor, num_layers=2,
    )  # fmt: skip


def configs(framework: str, folder: Path) -> dict[str, RunConfig]:
    """All runs of one framework, on both tracks."""
    found = {n: run_config(framework, *one) for n, one in BASELINES.items() if has(framework, n)}
    return found | best_configs(framework) | sharded_baselines(framework)


def sharded_baselines(framework: str) -> dict[str, RunConfig]:
    whole = run_config(framework, *BASELINES["plain-float64"])
    cut = whole.model_copy(update={"tensor_parallel": 2, "threads": 2})
    return {} if why_impossible(cut) else {"plain-shards": cut}


def best_configs(framework: str) -> dict[str, RunConfig]:
    executors = zip(BEST, ("table", "plain"), strict=True)
    found = {
        name: run_config(framework, e, "untied", "float32", 0.0, "1f1b", 1) for name, e in executors
    }
    return {name: one.model_copy(update={"track": "best"}) for name, one in found.items()}


@pytest.mark.parametrize("name", [*BASELINES, *BEST, "plain-shards"])
def test_baselines_and_best_track_train_the_same(framework: str, name: str, runs: Runs) -> None:
    """Every rung of the parity ladder."""
    if name not in runs:
        pytest.skip(f"{framework} has no such baseline")
    one, run = runs[name]
    comparison = compare_probe(run, expected(one), one.train.dtype)
    assert comparison.passed, comparison.report()


def test_the_best_track_says_what_it_does(framework: str, runs: Runs) -> None:
    for name in (*(name for name in BASELINES if has(framework, name)), *BEST):
        environment = runs[name].run.parts[0].environment
        assert environment["track"] == ("best" if name in BEST else "matched")
        assert any(line.endswith(": used") for line in environment["best"]) == (name in BEST), name


@pytest.mark.parametrize("framework", ["torch"], indirect=True)
@pytest.mark.parametrize(
    "name", [name for name in BASELINES if name.startswith("native") and name != "native-tied"]
)
def test_pytorchs_own_schedules_run_what_ours_of_that_name_do(name: str, runs: Runs) -> None:
    """Every micro-batch once per chunk, and for gpipe, 1f1b the same order as ours; PyTorch's
    others differ in it.
    """
    one, run = runs[name]
    schedule = make_schedule(one.schedule, STAGES, MICRO_BATCHES, one.chunks)
    for part in run.parts:
        device = part.devices[0]
        done = [event.action for event in part.steps[-1].events[device]]
        planned = list(map(str, schedule.devices[device]))
        forwards = [sorted(a for a in actions if a.startswith("F")) for actions in (done, planned)]
        assert forwards[0] == forwards[1]
        if one.schedule in ("gpipe", "1f1b"):
            assert done == planned
