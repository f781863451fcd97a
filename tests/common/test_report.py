"""Results that read back, tables from known numbers, comparisons with a known difference."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.report import facts
from common.report.compare import compare_runs, oracle_config, rounded_oracle_config
from common.report.machine import this_machine
from common.report.result import SCHEMA_VERSION, Parity, ResultError, RunResult, Step, measured
from common.report.tables import csv_table, grid, make_rows, print_table
from common.runtime.job import EventRecord, Part, StepRecord
from common.runtime.outcome import Outcome, of_first_line
from common.spec.parameters import TensorKey, parameter_shapes, random_arrays, unit_of
from common.spec.run import RunConfig, TrainSpec, preset

CONFIG = preset("tiny")  # 8 sequences of 16 tokens in a step


def result(
    framework: str = "torch",
    milliseconds: tuple[float, ...] = (900, 100, 120, 110, 100, 120, 110),
    **fields: object,
) -> RunResult:
    config = CONFIG.model_copy(update={"framework": framework})
    steps = tuple(
        Step(step=i, loss=5 - 0.1 * i, gradient_norm=1.0, seconds=ms / 1e3)
        for i, ms in enumerate(milliseconds)
    )
    known = {
        "status": "ok",
        "preset": "tiny",
        "untimed_steps": 1,
        "config": config,
        "steps": steps,
        "held_out_loss": 4.5,
        "environment": {"version": "1.0"},
        "peak_memory_bytes": {0: 150_000_000, 1: 50_000_000},
        "parity": Parity(status="pass"),
        "command": "bench_all.py",
        "machine": this_machine(),
    }
    return RunResult.model_validate(known | fields)


def failed(framework: str) -> RunResult:
    nothing = {"held_out_loss": None, "environment": {}, "parity": Parity()}
    return result(framework, (), status="failed", reason="crashed", **nothing)


def test_a_result_reads_back(tmp_path: Path) -> None:
    before = result(actions={0: "F0 BW0"}, median_step_events={0: []})
    before.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == before
    derived = json.loads((tmp_path / "result.json").read_text())["derived"]
    assert derived["first_step_seconds"] == 0.9
    assert derived["tokens_per_second"] == pytest.approx(128 / 0.110)


def test_a_loss_that_diverged_reads_back(tmp_path: Path) -> None:
    steps = (Step(step=0, loss=math.nan, gradient_norm=math.inf, seconds=1.0),)
    result(steps=steps).write(tmp_path / "result.json")
    step = RunResult.read(tmp_path / "result.json").steps[0]
    assert math.isnan(step.loss) and math.isinf(step.gradient_norm)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ResultError, match=r"schema_version = 99; this program reads 1 to 4"):
        RunResult.read(path)
    for text in ("{}", "[]", "not JSON", '{"schema_version": 1}'):
        path.write_text(text)
        with pytest.raises(ResultError):
            RunResult.read(path)


def test_parts_of_several_processes_become_one_result() -> None:
    def part(device: int, seconds: float, thread_count: int, replica: int = 0) -> Part:
        event = EventRecord(action="F0", ready_seconds=0, start_seconds=0, end_seconds=1)
        step = StepRecord(
            step=0, loss=5.0, gradient_norm=1.0, seconds=seconds, events={device: [event]}
        )
        return Part(
            devices=(device,),
            line=replica,
            steps=[step],
            build_seconds=seconds,
            peak_memory_bytes={device: 10 + replica},
            environment={"version": "1.0", "threads": thread_count},
            **{"held_out_loss": 4.0, "corpus_digest": "d", "corpus_bytes": 1},
        )

    parts = [part(0, 1.0, 1), part(0, 1.0, 1, 1), part(1, 2.0, 3), part(1, 2.0, 3, 1)]
    outcome = Outcome("ok", "", None, of_first_line(parts, stages=2), 9.0)
    fields = measured(outcome, CONFIG, 2)
    assert fields["timing"] is None  # no step is timed
    assert fields["steps"][0].seconds == 2.0
    assert fields["actions"] == {0: "F0", 1: "F0"}
    assert fields["peak_memory_bytes"] == {0: 10, 1: 10, 2: 11, 3: 11}
    assert fields["environment"] == {"version": "1.0", "threads": [1, 3]}


def test_the_results_readme_names_the_versions_that_are_read() -> None:
    text = (Path(__file__).parents[2] / "results" / "README.md").read_text()
    read = f"`common.report.result.RunResult.read` reads 1 to {SCHEMA_VERSION} and refuses others"
    assert read in text


def test_a_table_from_known_results() -> None:
    torch = [result("torch", (800, *[200] * 6), repeat=1)]
    torch = [result("torch"), *torch, result("torch", (700, *[400] * 6), repeat=2)]
    tensorflow = [result("tensorflow", (900, *[100] * 6), repeat=repeat) for repeat in range(2)]
    rows = make_rows([[failed("paddle")], torch, tensorflow])
    assert [row.status for row in rows] == ["failed", "ok", "ok"]
    assert rows[0].tokens_per_second is None and rows[0].ratio is None
    assert rows[1].tokens_per_second == pytest.approx(128 / 0.2)  # the middle one of three runs
    assert (rows[1].ratio, rows[2].ratio) == (1.0, pytest.approx(2.0))
    assert (rows[1].ratio_low, rows[2].verdict) == (None, "faster")
    assert rows[1].step_ms_median == pytest.approx(200)
    assert rows[1].first_step_seconds == pytest.approx(0.8)
    assert rows[1].peak_memory_mb == pytest.approx(200)
    lines = grid(rows).markdown().splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    row = "| tensorflow | 1.0 | 1f1b | 2 | 4 | ok | pass | 4.40000 | 4.50000 | 1,280 |"
    assert f"{row} 2.00 [1.05, 4.00] | faster |" in lines[-1]
    records = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert [record["framework"] for record in records] == ["paddle", "torch", "tensorflow"]
    assert float(records[2]["tokens_per_second"]) == pytest.approx(1280)


def test_a_row_that_fails_parity_is_shown_and_not_ranked() -> None:
    wrong = result("torch", parity=Parity(status="FAIL", reason="x"))
    rows = make_rows([[wrong, result("torch")], [result("tensorflow")]])
    assert (rows[0].parity, rows[0].ratio, rows[1].ratio) == ("FAIL", None, 1.0)
    assert rows[0].tokens_per_second is not None
    assert "not ranked" in grid(rows).markdown()


def on_cards(name: str, *places: str) -> dict[str, object]:
    known = {"version": "1.0", "device_kind": "cuda", "driver": "580"}
    return known | {"device_name": name, "stage_devices": list(places)}


def test_cards_have_names_and_no_ratio_leaves_its_kind_of_device() -> None:
    rows = make_rows(
        [
            [result("torch", (900, *[400] * 6), repeat=repeat) for repeat in range(2)],
            [result("torch", environment=on_cards("A", "cuda:0", "cuda:1"))],
            [result("torch", (900, *[220] * 6), environment=on_cards("A", "cuda:0", "cuda:0"))],
            [result("torch", environment=on_cards("B", "cuda:0", "cuda:1"))],
            [failed("paddle")],
        ]
    )
    assert [row.is_baseline for row in rows] == [True, True, False, True, False]
    assert rows[2].ratio == pytest.approx(0.5)
    assert [row.shares_gpu for row in rows] == [False, False, True, False, False]
    lines = grid(rows).markdown().splitlines()
    for line, device in zip(lines[2:5], ("| cpu |", "| 2 x A |", "| 1 x A |"), strict=True):
        assert device in line
    assert "| device |" in lines[0] and "| device |" not in grid(rows[:1]).markdown()
    shared = replace(rows[2], bubble_fraction=0.5, simulated_bubble_fraction=0.4)
    assert "| shared GPU |" in grid([shared]).markdown()
    assert "50.0%" in grid([replace(shared, gpus=2)]).markdown()


def test_facts_say_whether_graphs_were_used_and_who_fell_back() -> None:
    on_card = result("torch", environment=on_cards("A", "cuda:0") | {"cuda_graphs": "used"})
    fell_back = {"version": "1.0", "device_kind": "cpu", "fell_back": "paddle 1.0 sees no GPU"}
    on_cpu = result("paddle", environment=fell_back)
    ((name, said),) = facts._gpus([on_card, on_cpu, on_cpu])
    assert name == "GPUs"
    assert said == "A, driver 580, CUDA graphs used; on the CPU: paddle 1.0 sees no GPU"
    slow = on_cards("A") | {"without_gpu_kernel": "Loss (float64)"}
    assert facts._gpus([result("tensorflow", environment=slow)]) == [
        ("GPUs", "A, driver 580, no GPU kernel for Loss (float64)")
    ]


def test_one_step_has_no_throughput() -> None:
    row = make_rows([[result("torch", (900,))]])[0]
    assert (row.tokens_per_second, row.step_ms_median, row.first_step_seconds) == (None, None, 0.9)


@pytest.mark.parametrize(("width", "complete"), [(300, True), (80, False)])
def test_a_narrow_terminal_gets_fewer_columns_not_folded_ones(width: int, complete: bool) -> None:
    console = Console(width=width, file=io.StringIO())
    dropped = print_table(make_rows([[result("tensorflow")], [failed("paddle")]]), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert dropped is not complete
    assert ("held-out" in text) is complete
    assert "tokens/s" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_the_first_difference_is_named_in_the_order_of_computation() -> None:
    steps = tuple(Step(step=i, loss=5.0 - i, gradient_norm=1.0, seconds=1.0) for i in range(3))
    gradients = {
        TensorKey(0, "backward", -1, -1, unit_of(name), name): array
        for name, array in random_arrays(CONFIG.model, 3, "float64", 1.0).items()
    }
    same = compare_runs(steps, gradients, steps, gradients, CONFIG)
    assert same.passed and len(same.differences) == 3 + len(parameter_shapes(CONFIG.model))

    other = {key: array.copy() for key, array in gradients.items()}
    for name in ("embedding.token.weight", "block.1.attention.query.weight"):
        key = next(key for key in other if key.tensor == name)
        other[key] = other[key] * (1 + 1e-3)
    late = (*steps[:2], steps[2].model_copy(update={"loss": math.nan}))
    # Of two gradients that differ, the backward comes to block 1's first.
    first = compare_runs(late, other, steps, gradients, CONFIG).first_failure
    assert first is not None and first.key.tensor == "block.1.attention.query.weight"
    assert (first.key.stage, first.key.unit, first.check) == (1, "block.1", "gradient")
    last = compare_runs(late, gradients, steps, gradients, CONFIG).first_failure
    assert last is not None and (last.key.step, last.key.tensor) == (2, "loss")
    assert np.isnan(last.observed)


def test_a_loss_curve_in_bfloat16_may_go_where_rounded_weights_alone_lead() -> None:
    low = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"dtype": "bfloat16"})})
    steps = tuple(Step(step=i, loss=5.0, gradient_norm=1.0, seconds=1.0) for i in range(3))
    for at, passes in ((2, True), (0, False)):  # the first loss has no such excuse
        off = tuple(s.model_copy(update={"loss": 5.1 if s.step == at else 5.0}) for s in steps)
        assert not compare_runs(off, {}, steps, {}, low).passed
        assert compare_runs(off, {}, steps, {}, low, curve_floor=0.01).passed == passes
    assert oracle_config(low) == oracle_config(CONFIG)
    rounded = rounded_oracle_config(low)
    assert rounded is not None and rounded.train.dtype == "bfloat16"
    assert rounded_oracle_config(CONFIG) is None


def test_a_loss_curve_may_go_where_compression_alone_leads() -> None:
    train = CONFIG.train.model_copy(update={"micro_batches": 2})
    low = CONFIG.model_copy(update={"train": train, "replicas": 2, "compress": "topk:0.01"})
    assert oracle_config(low) == oracle_config(CONFIG)
    own = rounded_oracle_config(low)
    assert own is not None and (own.replicas, own.compress) == (2, "topk:0.01")
    assert (own.train.micro_batches, own.train.dtype) == (2, "float64")
    steps = tuple(Step(step=i, loss=5.0, gradient_norm=1.0, seconds=1.0) for i in range(3))
    off = tuple(s.model_copy(update={"loss": 5.1 if s.step == 2 else 5.0}) for s in steps)
    assert not compare_runs(off, {}, steps, {}, low).passed
    assert compare_runs(off, {}, steps, {}, low, curve_floor=0.01).passed
    first = (steps[0].model_copy(update={"loss": 5.0001}), *steps[1:])
    assert not compare_runs(first, {}, steps, {}, low, curve_floor=0.01).passed


def test_a_missing_gradient_fails() -> None:
    gradients = {TensorKey(0, "backward", -1, -1, "head", "head.output.weight"): np.ones(3)}
    first = compare_runs((), {}, (), gradients, CONFIG).first_failure
    assert first is not None and "head.output.weight" in str(first)


def test_one_oracle_serves_what_does_not_change_the_numbers() -> None:
    one = CONFIG
    train = TrainSpec(**one.train.model_dump() | {"micro_batches": 8, "dtype": "float64"})
    cut = {"framework": "paddle", "stages": 4, "schedule": "gpipe", "partition": "balanced"}
    other = RunConfig(model=one.model, train=train, **cut)
    assert oracle_config(one) == oracle_config(other)
    assert oracle_config(one) != oracle_config(one.model_copy(update={"corpus": ("a.txt",)}))
