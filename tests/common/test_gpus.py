"""The GPUs of the machine, from what the driver's program prints; and what needs one for every
stage.
"""

from __future__ import annotations

import pytest

from common.spec import gpus as machine
from common.spec import rules
from common.spec.gpus import Gpu, _chosen, fell_back, gpus_of_stages, why_no_gpu
from common.spec.run import RunConfig

SAID = """0, GPU-aa11, NVIDIA H200, 143771, 580.95.05
1, GPU-bb22, NVIDIA H100 NVL, 95830, 580.95.05
No devices were found
2, GPU-cc33, Orin (nvgpu), [N/A], 540.4.0
"""
H200 = Gpu("NVIDIA H200", 143771 * 2**20, "580.95.05")


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        (None, ["NVIDIA H200", "NVIDIA H100 NVL", "Orin (nvgpu)"]),
        ("1, 0", ["NVIDIA H100 NVL", "NVIDIA H200"]),
        ("GPU-b", ["NVIDIA H100 NVL"]),
        ("0,7,1", ["NVIDIA H200"]),
        ("-1", []),
        ("", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    variable: str | None, names: list[str]
) -> None:
    assert [gpu.name for gpu in _chosen(SAID, variable)] == names


def test_memory_and_driver() -> None:
    assert _chosen(SAID, "0") == (H200,)
    assert _chosen(SAID, "2")[0].memory_bytes == 0


@pytest.mark.parametrize(
    ("stages", "gpus", "expected"),
    [
        (2, 8, [0, 1]),
        (4, 2, [0, 0, 1, 1]),
        (3, 2, [0, 0, 1]),
        (5, 3, [0, 0, 1, 1, 2]),
        (2, 1, [0, 0]),
    ],
)
def test_neighbours_share_where_there_are_fewer_gpus_than_stages(
    stages: int, gpus: int, expected: list[int]
) -> None:
    assert gpus_of_stages(stages, gpus) == expected


@pytest.mark.parametrize(
    ("gpus", "options", "refused"),
    [
        (1, {"device": "cuda"}, True),
        (1, {"device": "auto"}, True),
        (1, {"device": "cpu"}, False),
        (2, {"device": "cuda"}, False),
        (1, {"device": "cuda", "executor": "table"}, False),
        (0, {"device": "auto"}, False),
    ],
)
def test_a_process_per_stage_needs_a_gpu_per_stage(
    gpus: int, options: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "visible_gpus", lambda: (H200,) * gpus)
    monkeypatch.setattr(rules, "has_cuda", lambda: True)
    config = RunConfig.model_validate(
        {"stages": 2, "schedule": "1f1b", "executor": "native"} | options
    )
    expected = (
        "executor = native: NCCL takes one process per GPU, and 2 have 1; expected "
        "stages x replicas x tensor_parallel = 1, or device = cpu"
    )
    assert str(rules.why_impossible(config)) == (expected if refused else "None")


@pytest.mark.parametrize(
    ("gpus", "device", "kind", "says"),
    [
        (1, "auto", "cpu", True),
        (1, "auto", "cuda", False),
        (1, "cpu", "cpu", False),
        (0, "auto", "cpu", False),
    ],
)
def test_who_computes_on_the_cpu_beside_a_gpu_says_why(
    gpus: int, device: str, kind: str, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: (H200,) * gpus)
    said = {"framework": "torch", "version": "2.13.0+cpu", "device_kind": kind}
    why = (
        "torch 2.13.0+cpu uses none of 1 GPU: it is a CPU build; expected one for CUDA "
        "(make install GPU=1)"
    )
    assert fell_back(device, said, "") == ({"fell_back": why} if says else {})


@pytest.mark.parametrize(
    ("cuda", "driver", "why"),
    [
        ("", "580.95.05", "it is a CPU build; expected one for CUDA (make install GPU=1)"),
        ("13.0", "580.65.06", None),
        (
            "13.0",
            "575.57.08",
            "the driver 575.57.08 is too old for CUDA 13.0; expected 580 or later",
        ),
        ("12.6", "525.60.13", None),
        ("12.6", "470.1", "the driver 470.1 is too old for CUDA 12.6; expected 525 or later"),
        ("14.1", "580.95.05", None),
        ("13.0", "[N/A]", None),
    ],
)
def test_a_driver_is_held_against_what_a_wheel_was_built_for(
    cuda: str, driver: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = (Gpu("NVIDIA H200", 0, driver),) * 2
    assert why_no_gpu(cuda, gpus) == why
    assert why_no_gpu(cuda, ()) == "no NVIDIA driver shows a GPU"
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    said = fell_back("auto", {"framework": "a", "version": "1", "device_kind": "cpu"}, cuda)
    assert (why or f"CUDA {cuda} and the driver {driver} fit") in said["fell_back"]
    assert said["fell_back"].startswith("a 1 uses none of 2 GPUs: ")
