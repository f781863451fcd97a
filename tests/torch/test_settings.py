"""Settings, read back."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.harness.launch import last_error
from common.runtime.job import Job
from common.runtime.worker import no_drift
from tests.engines import Make, batch, small
from torch_impl import devices, gpus, ranks
from torch_impl.drift import switch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no CUDA"):
        devices.configure(4, 4, "cuda")


def test_the_version_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    for available, said in ((True, "2.28.3"), (False, "none")):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda known=available: known)
        assert gpus.nccl_version() == said


def test_ranks_that_would_share_a_gpu_are_refused_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        devices, "stage_devices", lambda stages, device: [torch.device("cuda", 0)] * stages
    )
    monkeypatch.setattr(ranks, "run", None)
    config = small("torch", 2, run={"executor": "native", "device": "cuda"})
    assert ranks.run_on_ranks([Job(config=config, out=str(tmp_path))], no_drift) == 1
    assert last_error((tmp_path / "failed-0.txt").read_text()) == (
        "ValueError: NCCL takes one process per GPU, and 2 have 1; expected stages x replicas x "
        "tensor_parallel = 1, or device = cpu"
    )


@pytest.mark.parametrize(("kind", "method"), [("cuda", "spawn"), ("cpu", "fork")])
def test_ranks_on_gpus_are_spawned(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(
        devices,
        "stage_devices",
        lambda stages, device: [torch.device(kind, 0), torch.device(kind, 1)],
    )
    monkeypatch.setattr(ranks, "run", lambda how, jobs, switch: started.append(how) or 0)
    assert ranks.run_on_ranks([Job(config=small("torch", 2), out="")], switch) == 0
    assert [how.start_method for how in started] == [method]
    # What a spawned rank is given.
    assert pickle.loads(pickle.dumps((started[0], switch))) == (started[0], switch)


def test_on_the_cpu_cuda_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are forked from a process that has asked it fail in their optimizers."""
    monkeypatch.setattr(torch.cuda, "is_available", None)
    monkeypatch.setattr(torch.cuda, "device_count", None)
    assert devices.stage_devices(2, "cpu") == [torch.device("cpu")] * 2


@pytest.mark.parametrize("run", [{}, {"executor": "plain"}])
def test_a_closed_engine_gives_back_what_cublas_holds(
    run: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: freed.append("all"), raising=False
    )
    engine = make(1, run=run)
    engine.close()
    assert freed == []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(engine, "_device", gpu, raising=False)
    monkeypatch.setattr(engine, "_torch_devices", [gpu], raising=False)
    engine.close()
    assert freed == ["all"]


@pytest.mark.parametrize(("threads", "per_stage"), [(2, 1), (4, 2)])
def test_the_threads_are_shared_by_the_stages(make: Make, threads: int, per_stage: int) -> None:
    assert make(2, run={"threads": threads}).environment()["threads_per_stage"] == per_stage


def test_what_ran_is_the_schedule(make: Make) -> None:
    engine = make(2, "gpipe")
    engine.forward_backward(batch(engine))
    assert [[event.action for event in engine.events()[d]] for d in (0, 1)] == list(
        map(list, engine.schedule.devices)
    )


def test_the_peak_is_the_systems(make: Make) -> None:
    engine = make(2, "gpipe")
    engine.forward_backward(batch(engine))
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert engine.peak_memory_bytes() == {0: pytest.approx(kibibytes * 1024, rel=0.02)}


FIRST_CALLS = """
import math, os, torch
from torch_impl.devices import configure


def exp_is_right():
    os.environ["MKL_VML_DEBUG_CPU_TYPE"] = "9"
    x = torch.linspace(0, 1, 64, dtype=torch.float64)
    right = torch.tensor(list(map(math.exp, x.tolist())), dtype=x.dtype)
    return torch.allclose(x.exp(), right, rtol=1e-14, atol=0)


if os.fork() == 0:
    print(exp_is_right(), flush=True)
    os._exit(0)
os.wait()
configure(2, 2, "cpu")
print(exp_is_right())
"""


def test_mkl_knows_the_processor_before_threads_start() -> None:
    """The variable gives MKL for good what its first call holds for a moment, before it knows the
    processor; only that call reads it. So exp is wrong in the process that was not configured, and
    must stay right in the one that was.
    """
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS], stdout=subprocess.PIPE, text=True, check=True
    )
    unconfigured, configured = done.stdout.split()
    assert configured == "True"
    if unconfigured == "True":
        pytest.skip("this PyTorch has no such MKL")
