"""Every framework against the oracle, tensor by tensor, and against itself, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.parity import Comparison, compare
from common.probes import compare_probe
from common.schedule.generators import make_schedule
from common.spec import FRAMEWORKS, RunConfig
from tests.parity.ladder import CASES, Run, case_config, config, expected, first_different_bits, run_probes

Ladder = Callable[[str], dict[str, Run]]
Judge = Callable[[str, str, Comparison], None]

every_case = pytest.mark.parametrize("case", CASES)
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS)


@every_framework
@every_case
def test_against_the_oracle(framework: str, case: str, ladder: Ladder, judge: Judge) -> None:
    one, run = case_config(framework, case), ladder(framework)[case]
    want, dtype = expected(one), one.train.dtype
    judge(framework, dtype, compare_probe(run, want, dtype))
    assert want.losses[-1] < want.losses[0] - 0.3, "the run must learn, or its curve proves nothing"


@every_framework
@every_case
def test_executed_equals_planned(framework: str, case: str, ladder: Ladder) -> None:
    assert_executed_equals_planned(case_config(framework, case), ladder(framework)[case])


def assert_executed_equals_planned(one: RunConfig, run: Run) -> None:
    schedule = make_schedule(one.schedule, one.stages, one.train.micro_batches, one.chunks)
    for step in (0, one.train.steps - 1):
        done = {
            device: [event.action for event in events]
            for part in run.parts
            for device, events in part.steps[step].events.items()
        }
        assert done == {device: list(map(str, actions)) for device, actions in enumerate(schedule.devices)}


# name: p, partition, schedule, chunks, recompute; all with m = 4, over 4 units, and equal to the first to the bit.
# 8 sequences make micro-batches of 2; 10 make such of 3, 3, 2 and 2.
SPLIT = """# schedule: split micro_batches=4
0: F0 F1 F2 B0 W0 F3 B1 W1 B2 B3 W2 W3
1: F0 B0 F1 B1 W0 F2 B2 F3 B3 W1 W2 W3
"""
VARIANTS: dict[str, tuple[int, str, str, int, str]] = {
    "one-stage": (1, "even", "gpipe", 1, "none"),
    "one-stage-1f1b": (1, "even", "1f1b", 1, "none"),
    "rerun": (2, "even", "1f1b", 1, "none"),
    "rerun-again": (2, "even", "1f1b", 1, "none"),
    "naive": (2, "even", "naive", 1, "none"),
    "gpipe": (2, "even", "gpipe", 1, "none"),
    "split": (2, "even", "file:SPLIT", 1, "none"),
    "uneven": (2, "1", "1f1b", 1, "none"),
    "four": (4, "even", "1f1b", 1, "none"),
    "three-uneven": (3, "1,3", "gpipe", 1, "none"),
    "interleaved": (2, "even", "interleaved", 2, "none"),
    "zb-h1": (4, "even", "zb-h1", 1, "none"),
    "zb-h2": (2, "even", "zb-h2", 1, "none"),
    "zb-v": (2, "even", "zb-v", 2, "none"),
    "recompute-full": (2, "even", "1f1b", 1, "full"),
    "recompute-full-split": (2, "even", "zb-h1", 1, "full"),
    "recompute-every-1": (2, "even", "zb-h1", 1, "every-1"),
    "recompute-except-last": (4, "even", "1f1b", 1, "except-last"),
}


@every_framework
@pytest.mark.parametrize(
    ("dtype", "head", "norm", "batch_size"), [("float32", "tied", "pre", 10), ("float64", "untied", "post", 8)]
)  # fmt: skip
def test_every_schedule_and_partition_gives_the_same_bits(
    framework: str, dtype: str, head: str, norm: str, batch_size: int, tmp_path: Path
) -> None:
    (tmp_path / "split.txt").write_text(SPLIT)
    configs = {
        name: config(
            framework, p, 4, dtype, head, norm, "gelu", partition, 0.1,
            schedule.replace("SPLIT", str(tmp_path / "split.txt")), steps=3, chunks=chunks, num_layers=2,
            recompute=recompute, batch_size=batch_size,
        )
        for name, (p, partition, schedule, chunks, recompute) in VARIANTS.items()
    }  # fmt: skip
    few = config(
        framework, 2, 1, dtype, head, norm, "gelu", "even", 0.1, "zb-v", steps=3, chunks=2, num_layers=2,
        batch_size=batch_size,
    )  # fmt: skip
    runs = run_probes(configs | {"few": few}, tmp_path / "runs")
    comparison = compare_probe(runs.pop("few"), expected(few), dtype)  # other bits: one micro-batch, for two stages
    assert comparison.passed, comparison.first_failure
    for name, run in runs.items():
        assert_executed_equals_planned(configs[name], run)
    different = {name: first_different_bits(runs["one-stage"], run) for name, run in runs.items()}
    assert not any(different.values()), {name: where for name, where in different.items() if where}


def test_a_wrong_model_fails_and_the_first_place_is_named(ladder: Ladder) -> None:
    """An epsilon of 1e-3 (Keras' default) instead of 1e-5: the first norm is in block 0."""
    case = "2-4-float64"
    one = case_config("torch", case)
    wrong = one.model_copy(update={"model": one.model.model_copy(update={"norm_epsilon": 1e-3})})
    comparison = compare(ladder("torch")[case].phase("forward"), expected(wrong).unit_outputs, "activation", "float64")
    first = comparison.first_failure
    assert first is not None and first.key.unit == "block.0" and first.key.micro_batch == 0
