"""`triptych doctor`: what it measures, and what it says of a framework that cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.cli import doctor
from common.cli.main import main
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.harness.roofline import Measured, measure
from common.runtime.roofline import Kernel, kernels
from common.spec.gpus import Gpu
from common.spec.run import RunConfig, preset

FAKE = Implementation("tests.fakes", "json", "")
MISSING = Implementation("tests.fakes", "no_such_package", "make install")


def config(context_length: int) -> RunConfig:
    tiny = preset("tiny")
    return tiny.model_copy(
        update={"model": tiny.model.model_copy(update={"context_length": context_length})}
    )


def test_the_work_of_a_step_is_what_its_formulas_say() -> None:
    one = preset("small")  # n = 2 x 128 tokens, d = 256, f = 1024, 8 heads, 6 blocks, 256 bytes
    work = {kernel.name: (kernel.work, kernel.unit, kernel.calls) for kernel in kernels(one)}
    assert work["query, key, value, output"] == (2 * 256 * 256 * 256, "GFLOP/s", 24)
    assert work["feed-forward up, weight gradient"] == (2 * 256 * 256 * 1024, "GFLOP/s", 6)
    assert work["attention scores"] == (2 * 8 * 2 * 128 * 128 * 32, "GFLOP/s", 18)
    assert work["softmax and gradient"] == (4 * 2 * 8 * 128 * 128 * 4, "GB/s", 6)
    assert work["layer norm and gradient"] == (4 * 256 * 256 * 4, "GB/s", 13)
    assert len(work) == 18


def test_what_cannot_be_measured_is_a_row_that_says_so_and_the_others_stay() -> None:
    seen = measure(config(16), ["torch", "paddle"], 2, {"torch": FAKE, "paddle": MISSING})
    assert set(seen["torch"].seconds) == {kernel.name for kernel in kernels(config(16))}
    assert seen["paddle"] == Measured({}, {}, "no_such_package is not installed; make install")
    assert len(seen["machine"].seconds) == 2


@pytest.mark.parametrize(
    ("context_length", "said"),
    [(13, "dtype = bfloat16: has no kernel for matmul"), (14, "its process has ended (status 3)")],
)
def test_a_framework_that_refuses_or_dies_says_why(context_length: int, said: str) -> None:
    assert measure(config(context_length), ["torch"], 1, {"torch": FAKE})["torch"].error == said


def test_below_half_of_the_fastest_is_marked() -> None:
    kernel = Kernel("product", 1.0, "GFLOP/s", 1)
    seconds = {"torch": 1.0, "tensorflow": 1.9, "paddle": 2.1}
    found = {name: Measured({}, {"product": own}) for name, own in seconds.items()}
    assert doctor.slow(kernel, found | {"machine": Measured({}, {"copy": 9.0})}) == ["paddle"]


def test_the_table_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "measure", lambda *given: measure(*given[:3], {"torch": FAKE, "paddle": MISSING})
    )
    monkeypatch.setattr(
        doctor, "visible_gpus", lambda: (Gpu("NVIDIA H200", 140 * 2**30, "580.95"),)
    )
    line = ["doctor", "--frameworks", "torch,paddle", "--preset", "tiny", "--rounds", "1"]
    assert main([*line, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "feed-forward down, weight gradient" in printed
    assert "GPUs: NVIDIA H200 with 140 GiB; driver 580.95; " in printed
    assert "paddle: no_such_package is not installed; make install" in printed
    assert set(json.loads((tmp_path / "found.json").read_text())["measured"]) == {
        "machine",
        "torch",
        "paddle",
    }
    assert main([*line[:2], "paddle", *line[3:]]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frameworks", "jax"], "--frameworks = 'jax': unknown"),
        (["--rounds", "0"], "'0'; expected a whole number, at least 1"),
        (["--rounds", "²"], "'²'; expected a whole number, at least 1"),
        (["--d-model", "33"], "num_heads"),
        (["--schedule", "1f1b"], "--schedule: unknown option"),
        (["--json", "no/such/folder/x.json"], "--json"),
    ],
)
def test_wrong_input_is_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *options]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_every_implementation_has_its_list() -> None:
    root = Path(__file__).parents[2]
    assert all((root / one.module / "roofline.py").exists() for one in IMPLEMENTATIONS.values())
