"""Reports over made-up result files of different devices and interpreters: what is compared with
what, and what is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.report.baselines import baseline_ratios
from common.report.collect import collect
from common.report.compare_runs import compare_collections
from common.report.publish import publish
from common.report.result import RunResult
from common.report.sweep import curves
from common.spec.run import RunConfig
from tests.common.test_report_page import config, outcome, write

CPU = {"version": "1.0", "device_kind": "cpu", "device_name": "AVX512"}


def cards(name: str, *places: str) -> dict[str, Any]:
    found = {"version": "1.0", "device_kind": "cuda", "device_name": name, "driver": "580.95"}
    return found | {"stage_devices": list(places), "cuda": "13.0"}


def add(folder: Path, row: int, run: RunConfig, said: Mapping[str, Any], scale: float = 1) -> None:
    """A row of two repeats whose worker processes said this of themselves."""
    done = outcome(run, scale)
    (part,) = done.parts
    done = replace(done, parts=(part.model_copy(update={"environment": dict(said)}),))
    for repeat in range(2):
        write(folder, run, done, row, repeat)


def test_stages_that_share_a_gpu_are_marked_wherever_a_bubble_stands(tmp_path: Path) -> None:
    add(tmp_path, 0, config("torch"), cards("H200", "cuda:0", "cuda:1"))
    add(tmp_path, 1, config("tensorflow"), cards("H200", "GPU:0", "GPU:0"))
    collection = collect([tmp_path])
    publish(collection, tmp_path)
    apart, shared = collection.rows
    assert apart.bubble_fraction and apart.simulated_step_difference is not None
    assert shared.bubble_fraction is shared.simulated_step_difference is None
    report = (tmp_path / "report.md").read_text()
    (table_line,) = re.findall(r"\| tensorflow \| 1\.0 .*", report)
    (timing_line,) = re.findall(r"\| tensorflow 1f1b .*shared.*", report)
    assert table_line.count("shared GPU") == 1 and "| 1 x H200 |" in table_line
    assert timing_line.count("shared GPU") == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("stages share a GPU") >= 2 and page.count('n">shared GPU') == 2
    assert "within 5 % of the measured median in 1 of 1 rows" in report
    assert "GPUs: H200, driver 580.95, CUDA 13.0" in report


def test_no_ratio_goes_from_one_kind_of_device_to_another(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    plain = config("torch", executor="plain", stages=1, schedule="naive")
    for folder, said in ((a, CPU), (b, cards("H200", "cuda:0", "cuda:1"))):
        add(folder, 0, config("torch"), said)
        add(folder, 1, config("paddle"), CPU, 2.0)
    add(b, 2, plain, CPU)
    first, second = collect([a]), collect([b])
    assert [row.ratio is None for row in second.rows] == [False] * 3
    assert [row.is_baseline for row in second.rows] == [True, True, False]
    assert not [pair for pair in baseline_ratios(second) if pair.ours.device == "H200"]
    compared = compare_collections(first, second)
    assert [change.ratio is None for change in compared.changes] == [True, False]
    assert compared.notes[0] == (
        "different devices, whose speeds are not compared: cpu against H200"
    )
    publish(second, b)
    page = (b / "report.html").read_text()
    assert "torch 1f1b p=2 m=4, H200" in page and "paddle 1f1b p=2 m=4, cpu" in page


def test_cpus_of_two_kinds_are_two_kinds_of_device(tmp_path: Path) -> None:
    for row, framework in enumerate(("torch", "paddle")):
        add(tmp_path, row, config(framework), CPU)  # type: ignore[arg-type]
    for path in tmp_path.glob("paddle*/result.json"):
        content = json.loads(path.read_text())
        content["machine"]["cpu"] = "another"
        path.write_text(json.dumps(content))
    assert [row.is_baseline for row in collect([tmp_path]).rows] == [True, True]


def test_a_run_that_failed_is_said_to_have_run_on_nothing(tmp_path: Path) -> None:
    add(tmp_path, 0, config("torch"), cards("H200", "cuda:0", "cuda:1"))
    failed = replace(outcome(config("paddle")), status="failed", reason="crashed", parts=())
    write(tmp_path, config("paddle"), failed, 1)
    assert [row.device for row in collect([tmp_path]).rows] == ["H200", ""]


def test_a_plugins_device_is_no_cpu(tmp_path: Path) -> None:
    said = cards("NPU", "npu:0", "npu:0") | {"device_kind": "npu"}
    add(tmp_path, 0, config("paddle"), said)
    (row,) = collect([tmp_path]).rows
    assert (row.device, row.gpus, row.shares_gpu) == ("NPU", 1, True)


def test_a_sweep_has_no_ideal_where_stages_share_a_gpu(tmp_path: Path) -> None:
    for row, (stages, places) in enumerate([(1, ["cuda:0"]), (2, ["cuda:0", "cuda:0"])]):
        add(tmp_path, row, config("torch", stages=stages), cards("H200", *places))
    collection = collect([tmp_path])
    (curve,) = curves(collection.rows, "stages")
    assert curve.x == (1, 2) and curve.ideal == ()
    publish(collection, tmp_path, sweep=True)
    assert (tmp_path / "sweep_stages.png").exists()


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        # One version here, another there: they are what is compared.
        (["/envs/old/bin/python"], ["/envs/new/bin/python"], ["torch@old -> torch@new"]),
        ([None], ["/envs/new/bin/python"], ["torch -> torch@new"]),
        # Where an environment lies does not matter, its name does.
        (
            [None, "/envs/new/bin/python"],
            ["/opt/new/bin/python", None],
            ["torch", "torch@new"],
        ),
        ([None, "/envs/new/bin/python"], ["/opt/new/bin/python"], ["torch@new"]),
        ([None, "/a/x/bin/python"], ["/a/y/bin/python", "/a/z/bin/python"], []),
    ],
)
def test_two_benchmarks_are_compared_by_the_names_of_interpreters(
    before: list[str | None], after: list[str | None], names: list[str], tmp_path: Path
) -> None:
    for folder, pythons in (("a", before), ("b", after)):
        for row, python in enumerate(pythons):
            add(tmp_path / folder, row, config("torch", python=python), CPU)
    a, b = (collect([tmp_path / folder]) for folder in ("a", "b"))
    assert len(a.rows) == len(before)
    compared = compare_collections(a, b)
    said = [change.name.replace(" 1f1b p=2 m=4", "") for change in compared.changes]
    assert said == names
    assert len(compared.only_before) == len(before) - len(names)
    assert len(compared.only_after) == len(after) - len(names)


def test_results_from_before_there_were_interpreters_are_read(tmp_path: Path) -> None:
    add(tmp_path, 0, config("torch"), CPU)
    for path in tmp_path.glob("*/result.json"):
        content = json.loads(path.read_text())
        del content["config"]["python"]
        path.write_text(json.dumps(content))
        assert RunResult.read(path).config.python is None
