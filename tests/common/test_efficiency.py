"""Model FLOPs, peaks and MFU: counted by hand, of made-up results, and through the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.harness.peak import Probe, peak_of
from common.report.collect import collect
from common.report.result import Peak, RunResult
from common.report.sections import sections
from common.report.tables import columns_for, csv_table, make_rows
from common.spec.efficiency import model_flops_per_token, published_flops_per_second
from common.spec.parameters import parameter_shapes
from common.spec.plan import Plan, plan_one
from common.spec.run import RunConfig, TrainSpec, TransformerSpec, preset
from common.spec.unit_times import counted_times
from tests.common.test_report import CONFIG, result

H100S = {"device_kind": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}


def test_model_flops_are_6n_and_12lsd() -> None:
    model = TransformerSpec(
        vocab_size=256, context_length=16, num_layers=3, d_model=8, num_heads=2, d_ff=24
    )
    config = RunConfig(stages=1, model=model, train=TrainSpec(batch_size=7, micro_batches=3))
    weights = 3 * (4 * 8 * 8 + 2 * 8 * 24) + 8 * 256
    flops = model_flops_per_token(config)
    assert flops == 6 * weights + 12 * 3 * 16 * 8
    matrices = {name: s for name, s in parameter_shapes(model).items() if len(s) == 2}
    lookups = {"embedding.token.weight", "embedding.position.weight"}
    assert weights == sum(a * b for name, (a, b) in matrices.items() if name not in lookups)
    other = TrainSpec(batch_size=64, dtype="float64")
    for same in ({"recompute": "full"}, {"replicas": 2}, {"train": other}):
        assert model_flops_per_token(config.model_copy(update=same)) == flops
    tied = model.model_copy(update={"tied_head": True})
    assert model_flops_per_token(config.model_copy(update={"model": tied})) == flops


@pytest.mark.parametrize(
    ("card", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "float64", 60),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("Tesla T4", "float32", None),
        ("NVIDIA RTX A1000", "float32", None),
    ],
)
def test_published_figures(card: str, dtype: str, tflops: float | None) -> None:
    found = published_flops_per_second(card, dtype)
    assert found == (None if tflops is None else tflops * 1e12)


def test_peaks_are_of_all_devices_together() -> None:
    one_thread = RunConfig(stages=1, threads=1)
    assert Probe.of_run(one_thread, {"device_kind": "cpu"}) == Probe("float32", 1, "cpu")
    assert Probe.of_run(RunConfig(), {"version": "1"}) is None
    peak = peak_of(Probe("float32", 2, "cpu"), (5e10, "NumPy 2"), {})
    assert (peak.measured_flops_per_second, peak.measured_by) == (
        5e10,
        "NumPy 2, float32, 2 threads",
    )
    places = {"stage_devices": ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]}
    cards = peak_of(Probe("bfloat16", 8, "cuda"), (7e14, "PyTorch 2"), H100S | places)
    assert cards.measured_flops_per_second == 2 * 7e14
    assert cards.published_flops_per_second == 2 * 989e12
    mixed = H100S | places | {"device_name": ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB"]}
    unknown = peak_of(Probe("bfloat16", 8, "cuda"), (None, ""), mixed)
    assert unknown == Peak()


def test_pytorch_multiplies_in_the_interpreter_that_its_user_has_named() -> None:
    named = RunConfig(python="/envs/new/bin/python")
    other = named.model_copy(update={"framework": "paddle"})
    probes = [
        Probe.of_run(run, {"device_kind": kind})
        for run in (named, other)
        for kind in ("cpu", "cuda")
    ]
    assert [probe and probe.python for probe in probes] == [None, named.python, None, None]


def test_a_row_has_its_share_of_the_peak(tmp_path: Path) -> None:
    flops = model_flops_per_token(CONFIG)
    per_second = 128 / 0.1 * flops  # 128 tokens in 100 ms
    peaks = [Peak(measured_flops_per_second=factor * per_second) for factor in (4, 5)]
    runs = [
        result("torch", (900, *[100] * 6), repeat=repeat, peak=peak)
        for repeat, peak in enumerate(peaks)
    ]
    (row,) = make_rows([runs])
    assert row.model_flops_per_token == flops
    assert row.model_tflops_per_device == pytest.approx(per_second / 1e12 / CONFIG.stages)
    assert row.mfu == pytest.approx((1 / 4 + 1 / 5) / 2) and row.published_mfu is None
    assert [column.cell(row) for column in columns_for([row]) if column.title == "MFU"] == ["22%"]
    assert ",mfu," in csv_table([row])
    for repeat, run in enumerate(runs):
        (tmp_path / f"torch-{repeat}").mkdir()
        run.write(tmp_path / f"torch-{repeat}" / "result.json")
        assert RunResult.read(tmp_path / f"torch-{repeat}" / "result.json").peak == peaks[repeat]
    (shown,) = [each for each in sections(collect([tmp_path]), {}) if each.name == "efficiency"]
    assert shown.grid is not None and "published MFU" not in shown.grid.titles
    assert "22.5%" in shown.grid.rows[0]


def test_an_old_result_has_flops_and_no_peak() -> None:
    old: dict[str, Any] = {"schema_version": 3}
    (row,) = make_rows([[result("torch", **old)]])
    assert row.model_tflops_per_device and row.mfu is None
    assert "MFU" not in [column.title for column in columns_for([row])]


def test_the_probe_measures() -> None:
    rate, by = Probe("float64", 1, "cpu").measure()
    assert rate is not None and rate > 1e6 and by.startswith("NumPy")
    assert Probe("no-such-type", 1, "cpu").measure() == (None, "")


def test_a_plan_uses_all_but_its_bubble() -> None:
    """With counted costs, equal stages and nothing computed twice."""
    config = preset("small").model_copy(update={"stages": 1, "schedule": "1f1b"})
    plan = plan_one(config, counted_times(config, 1e12), float("inf"))
    assert isinstance(plan, Plan) and plan.mfu == pytest.approx(1)
    again = plan_one(config, counted_times(config, 1e12), plan.peak_bytes - 1)
    assert isinstance(again, Plan) and again.config.recompute != "none"
    assert again.mfu is not None and 0.74 < again.mfu < 0.9  # 3/4 if all is computed again
