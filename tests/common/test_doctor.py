"""`triptych doctor`: what it measures, and what it says of a framework that cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.cli import doctor
from common.cli.main import main
from common.harness import interpreters
from common.harness.interpreters import Answer
from common.harness.kernel_times import Measured, measure
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.runtime.kernels import Kernel, kernels
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


def runs(context_length: int, *frameworks: str) -> dict[str, RunConfig]:
    one = config(context_length)
    return {name: one.model_copy(update={"framework": name}) for name in frameworks}


def test_what_cannot_be_measured_is_a_row_that_says_so_and_the_others_stay() -> None:
    seen = measure(runs(16, "torch", "paddle"), 2, {"torch": FAKE, "paddle": MISSING})
    assert set(seen["torch"].seconds) == {kernel.name for kernel in kernels(config(16))}
    assert seen["paddle"] == Measured({}, {}, "no_such_package is not installed; make install")
    assert len(seen["machine"].seconds) == 2


@pytest.mark.parametrize(
    ("context_length", "said"),
    [(13, "dtype = bfloat16: has no kernel for matmul"), (14, "its process has ended (status 3)")],
)
def test_a_framework_that_refuses_or_dies_says_why(context_length: int, said: str) -> None:
    assert measure(runs(context_length, "torch"), 1, {"torch": FAKE})["torch"].error == said


def test_below_half_of_the_fastest_on_the_same_device_is_marked() -> None:
    kernel = Kernel("product", 1.0, "GFLOP/s", 1)
    on_gpu = {"device_kind": "cuda", "device_name": "NVIDIA H200"}
    seconds = {"torch": 1.0, "tensorflow": 1.9, "paddle": 2.1}
    found = {name: Measured({}, {"product": own}) for name, own in seconds.items()}
    found["torch@new"] = Measured(on_gpu, {"product": 0.01})
    assert doctor.slow(kernel, found | {"machine": Measured({}, {"copy": 9.0})}) == ["paddle"]
    found["torch@old"] = Measured(on_gpu, {"product": 0.03})
    assert doctor.slow(kernel, found) == ["paddle", "torch@old"]


def test_the_tables_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", FAKE)  # type: ignore[index]
    monkeypatch.setitem(IMPLEMENTATIONS, "paddle", MISSING)  # type: ignore[index]
    monkeypatch.setattr(
        doctor, "visible_gpus", lambda: (Gpu("NVIDIA H200", 140 * 2**30, "580.95"),)
    )
    line = ["doctor", "--frameworks", "torch,paddle", "--preset", "tiny", "--rounds", "1"]
    assert main([*line, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "feed-forward down, weight gradient" in printed
    assert "GPUs: NVIDIA H200 with 140 GiB; driver 580.95\n" in printed
    assert "torch: json unknown: it is a CPU build; expected one for CUDA" in printed
    assert "paddle: no_such_package is not installed; make install" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["measured"]) == {"machine", "torch"}
    assert found["installed"]["paddle"]["version"] == ""
    assert main([*line[:2], "paddle", *line[3:]]) == 1


def test_without_rounds_only_what_is_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", FAKE)  # type: ignore[index]
    monkeypatch.setattr(doctor, "measure", lambda *_: pytest.fail("measures"))
    monkeypatch.setattr(doctor, "visible_gpus", lambda: ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--frameworks", "torch", "--rounds", "0"]) == 0
    printed = capsys.readouterr().out
    assert (
        "GPUs: none that an NVIDIA driver shows (nvidia-smi); CUDA_VISIBLE_DEVICES = ''" in printed
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", MISSING)  # type: ignore[index]
    assert main(["doctor", "--frameworks", "torch", "--rounds", "0"]) == 1


@pytest.mark.parametrize(
    ("package", "cuda", "nccl", "driver", "advice"),
    [
        ("torch", "13.0", "2.30.7", "580.95", ""),
        ("torch", "13.0", "2.30.7", "570.1", "torch 9: the driver 570.1 is too old for CUDA 13.0"),
        ("torch", "", "", "580.95", "torch 9: it is a CPU build"),
        ("tensorflow", "12.5.1", "2.32.3", "580.95", ""),
        ("tensorflow", "12.5.1", "", "580.95", "tensorflow 9: it has no CUDA libraries beside it"),
        ("tensorflow", "12.5.1", "", "", ""),
    ],
)
def test_advice(
    package: str, cuda: str, nccl: str, driver: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Answer("3.12.1", {package: "9"}, cuda, nccl)
    monkeypatch.setattr(interpreters, "ask", lambda python, package: answer)
    gpus = [Gpu("NVIDIA H200", 0, driver)] if driver else []
    found = interpreters.installation("x", package, "make install", None, gpus)
    assert found.advice.startswith(advice) and bool(found.advice) == bool(advice)
    assert (found.version, found.answer) == ("9", answer)


def test_every_implementation_has_its_list() -> None:
    root = Path(__file__).parents[2]
    assert all((root / one.module / "roofline.py").exists() for one in IMPLEMENTATIONS.values())
