"""Where the stages run, and every setting of PyTorch that changes numbers or speed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from common.runtime.cpus import threads_per_stage
from common.spec.gpus import visible_gpus
from common.spec.run import RunConfig

if TYPE_CHECKING:
    import torch


def configure(stages: int, threads: int | None, device: str) -> None:
    """Set what must be set before PyTorch computes anything. Raises ValueError for CUDA where there
    is none.

    PyTorch is imported in here, after the environment is set.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS needs it to be deterministic
    import torch

    torch.set_num_threads(threads_per_stage(stages, threads))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if stage_devices(stages, device)[0].type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stage_devices(stages: int, device: str) -> list[torch.device]:
    """One device per stage; neighbours share a GPU where there are fewer GPUs than stages. Raises
    ValueError.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise ValueError(
            "device = cuda, but this PyTorch sees no CUDA device; expected cpu or auto"
        )
    if device == "cpu" or not count:
        return [torch.device("cpu")] * stages
    used = min(count, stages)
    return [torch.device("cuda", i * used // stages) for i in range(stages)]


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the calling thread its share of the cores and, on CUDA, a stream of its own.

    Both settings belong to the thread. The GPU's default stream stays idle: a copy between GPUs
    waits for the current stream of its destination, and must not wait for that stage's computing.
    """
    import torch

    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


workspaces_freed = 0
"""How often, in this process. What was recorded before the last time must not be replayed: the
memory is not its own.
"""


def free_workspaces(used: Iterable[torch.device]) -> None:
    """Give back what cuBLAS holds for every thread's stream that has used it (32 MiB each, set by
    `configure`).

    For all of the process: others get theirs anew with their next product.
    """
    import torch

    if any(device.type == "cuda" for device in used):
        global workspaces_freed
        workspaces_freed += 1
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def fused_attention(config: RunConfig) -> bool:
    """Return whether attention is PyTorch's own kernel: on the track "best", and without dropout,
    whose masks are ours.
    """
    return config.track == "best" and config.model.dropout == 0


def best_track(config: RunConfig) -> dict[str, Any]:
    """Return the part of `environment` that says what the track "best" does, and what it leaves
    out.
    """
    used = "used" if fused_attention(config) else "not used with dropout"
    said = [
        f"scaled_dot_product_attention: {used}",
        "torch.compile: not used, see docs/frameworks.md",
    ]
    return {"track": config.track, "best": said if config.track == "best" else []}


def environment(used: Sequence[torch.device]) -> dict[str, Any]:
    """Versions, threads and flags as the calling thread finds them, and what the stages' devices
    are.
    """
    import torch

    device = used[0]
    cuda = device.type == "cuda"
    return {
        "framework": "torch",
        "version": torch.__version__,
        "python": platform.python_version(),
        "device_kind": device.type,
        "device_name": torch.cuda.get_device_name(device)
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

    return {
        "stage_devices": [str(device) for device in used],
        "driver": next((gpu.driver for gpu in visible_gpus()), "unknown"),
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    }


def nccl_version() -> str:
    """Of the library that this PyTorch brings; "none" where it was built without."""
    import torch

    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"


def gpus() -> str:
    """Return what this PyTorch makes of the machine's GPUs, in a line, with what to do where it
    sees none.
    """
    import torch

    wheel, found = torch.version.cuda, visible_gpus()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
        return f"sees {names}; CUDA {wheel}, NCCL {nccl_version()}"
    if not found:
        return f"computes on the CPU: no NVIDIA driver answers; CUDA {wheel or 'not built in'}"
    if wheel is None:
        return (
            "computes on the CPU: it is a CPU build; expected a CUDA build, from "
            "https://pytorch.org/get-started/locally"
        )
    return (
        f"computes on the CPU: it sees no GPU though the driver {found[0].driver} has "
        f"{len(found)}; expected a driver for "
        f"CUDA {wheel} or newer, or a PyTorch that was built for an older CUDA"
    )
