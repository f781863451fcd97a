"""Settings, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engines import Make, batch
from torch_impl import devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no CUDA"):
        devices.configure(4, 4, "cuda")


@pytest.mark.parametrize(("threads", "per_stage"), [(2, 1), (4, 2)])
def test_the_threads_are_shared_by_the_stages(make: Make, threads: int, per_stage: int) -> None:
    assert make(2, run={"threads": threads}).environment()["threads_per_stage"] == per_stage


def test_what_ran_is_the_schedule(make: Make) -> None:
    engine = make(2, "gpipe")
    engine.forward_backward(batch(engine))
    assert [[event.action for event in engine.events()[d]] for d in (0, 1)] == list(map(list, engine.schedule.devices))


def test_the_peak_is_the_systems(make: Make) -> None:
    engine = make(2, "gpipe")
    engine.forward_backward(batch(engine))
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert engine.peak_memory_bytes() == {0: pytest.approx(kibibytes * 1024, rel=0.02)}
