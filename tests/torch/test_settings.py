"""Settings, read back."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.harness.launch import last_error
from common.runtime.job import Job
from common.runtime.worker import no_drift
from common.spec.gpus import Gpu
from tests.engines import Make, batch, small
from torch_impl import devices, gpus, ranks
from torch_impl.drift import switch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no CUDA"):
        devices.configure(4, 4, "cuda")


@pytest.mark.parametrize(
    ("cuda", "available", "cards", "said"),
    [
        ("13.0", True, 1, "sees NVIDIA H200 with 140 GiB; CUDA 13.0, NCCL 2.28.3"),
        ("13.0", False, 0, "no NVIDIA driver answers; CUDA 13.0"),
        (None, False, 0, "no NVIDIA driver answers; CUDA not built in"),
        (None, False, 1, "it is a CPU build; expected a CUDA build"),
        ("13.0", False, 1, "the driver 580.95 has 1; expected a driver for CUDA 13.0 or newer"),
    ],
)
def test_what_it_makes_of_the_gpus(
    cuda: str | None, available: bool, cards: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(gpus, "visible_gpus", lambda: (Gpu("NVIDIA H200", 0, "580.95"),) * cards)
    assert said in gpus.gpus()


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
        "ValueError: executor = native: NCCL takes one process per GPU, and 2 stages have 1; "
        "expected stages = 1, or device = cpu"
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
    assert pickle.loads(pickle.dumps((started[0], switch))) == (
        started[0],
        switch,
    )  # what a spawned rank is given


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
