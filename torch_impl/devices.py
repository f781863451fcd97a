"""Where the stages run, and every setting of PyTorch that changes numbers or speed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.runtime.cpus import threads_per_stage
from common.spec.gpus import gpus_of_stages, visible_gpus
from common.spec.run import RunConfig

if TYPE_CHECKING:
    import torch


def configure(stages: int, threads: int | None, device: str) -> None:
    """Set what must be set, then import PyTorch. Raises ValueError for CUDA where there is none."""
    # cuBLAS needs it to be deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(threads_per_stage(stages, threads))
    # TF32 has 10 bits where float32 has 23; each of these switches it on somewhere.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # MKL's vector functions (exp, log, cos ...) ask what the processor is when the first of them is
    # called, and write the answer in two steps: 9, then what 9 means in their table. A thread that
    # reads the 9 takes a kernel of half the precision for one call. That was a loss 1e-13 off in
    # float64, in one run of nine (github.com/pytorch/pytorch/issues/188792). All of them share the
    # answer, so one call suffices, before there are threads.
    torch.ones(8, dtype=torch.float64).exp()
    if stage_devices(stages, device)[0].type == "cuda":
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is filled with NaN, to show who reads it too early.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stage_devices(stages: int, device: str) -> list[torch.device]:
    """One device per stage; neighbours share a GPU where there are too few. Raises ValueError."""
    import torch

    # On the CPU CUDA is not even asked: a process that has asked it anything cannot be forked into
    # ranks any more, whose optimizers ask it too.
    count = 0 if device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ValueError(
            "device = cuda, but this PyTorch sees no CUDA device; expected cpu or auto"
        )
    if not count:
        return [torch.device("cpu")] * stages
    return [torch.device("cuda", gpu) for gpu in gpus_of_stages(stages, count)]


def fused_attention(config: RunConfig) -> bool:
    """Return whether attention is PyTorch's own kernel: the track "best", without dropout."""
    return config.track == "best" and config.model.dropout == 0


def best_track(config: RunConfig) -> dict[str, Any]:
    """Return the part of `environment` that says what the track "best" does and leaves out."""
    used = "used" if fused_attention(config) else "not used with dropout"
    said = [
        f"scaled_dot_product_attention: {used}",
        "torch.compile: not used, see docs/frameworks.md",
    ]
    return {"track": config.track, "best": said if config.track == "best" else []}


def environment(used: Sequence[torch.device]) -> dict[str, Any]:
    """Versions, threads and flags as the calling thread finds them, and the stages' devices."""
    import torch

    device = used[0]
    cuda = device.type == "cuda"
    return {
        "framework": "torch",
        "version": torch.__version__,
        "python": platform.python_version(),
        "device_kind": device.type,
        "device_name": ", ".join(dict.fromkeys(map(torch.cuda.get_device_name, used)))
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        "threads_per_stage": torch.get_num_threads(),
        "kernels": "cuBLAS" if cuda else f"ATen {torch.backends.cpu.get_cpu_capability()}",
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    } | (_gpu_environment(used) if cuda else {})


def _gpu_environment(used: Sequence[torch.device]) -> dict[str, Any]:
    """What only a run on GPUs has."""
    import torch

    from torch_impl.gpus import nccl_version

    return {
        "stage_devices": [str(device) for device in used],
        "driver": next((gpu.driver for gpu in visible_gpus()), "unknown"),
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    }
