"""PyTorch's own runtime reads the CSV files that we write and trains as our engine does."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cli.main import main
from common.harness.probes import compare_probe
from common.schedule.generators import default_chunks, make_schedule
from tests.parity.ladder import config, expected, run_probes

SCHEDULES = ("zb-h2", "interleaved", "zb-v", "dualpipev")


def test_pytorchs_runtime_trains_with_our_files(tmp_path: Path) -> None:
    configs = {}
    for name in SCHEDULES:
        path = tmp_path / f"{name}.csv"
        size = ["--stages", "2", "--micro-batches", "4", "--output", str(path)]
        assert main(["simulate", name, *size]) == 0
        for executor in ("table", "native"):
            configs[f"{name}-{executor}"] = config(
                "torch", 2, 4, "float64", "tied", "pre", "gelu", "even", 0.1,
                f"file:{path}", steps=4, chunks=default_chunks(name), executor=executor,
            )  # fmt: skip
    runs = run_probes(configs, tmp_path)
    for name, one in configs.items():
        comparison = compare_probe(runs[name], expected(one), "float64")
        assert comparison.passed, comparison.report()
    for name in SCHEDULES:
        planned = make_schedule(name, 2, 4, default_chunks(name)).devices
        for part in runs[f"{name}-native"].parts:
            done = [event.action for event in part.steps[-1].events[part.devices[0]]]
            assert done == list(map(str, planned[part.devices[0]]))
        ours, theirs = (runs[f"{name}-{executor}"].losses for executor in ("table", "native"))
        assert theirs == pytest.approx(ours, rel=1e-14)
