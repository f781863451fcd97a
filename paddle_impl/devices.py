"""Where the stages run, and every setting of Paddle that changes numbers or speed."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.runtime.cpus import cpu_name, threads_per_stage
from common.spec.gpus import gpus_of_stages, visible_gpus
from common.spec.run import RunConfig
from paddle_impl import mkl
from paddle_impl.denormals import flush_denormals


def configure(ranks: int, threads: int | None, device: str) -> None:
    """Set what must be set before Paddle computes anything, in each of so many processes on this
    host. Raises ValueError for CUDA where there is none.

    Paddle is imported in here, after the environment is set. (MKL's kernels were chosen by the
    package, `paddle_impl.mkl`.)
    """
    flush_denormals()  # before there are threads
    count = str(threads_per_stage(ranks, threads))
    os.environ.update(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, OPENBLAS_NUM_THREADS=count)
    os.environ.update(
        NVIDIA_TF32_OVERRIDE="0", FLAGS_cudnn_deterministic="1", FLAGS_embedding_deterministic="1"
    )
    os.environ.update(FLAGS_use_onednn="0")
    os.environ.setdefault("GLOG_minloglevel", "2")
    # said by the import, needed for C++ extensions only
    warnings.filterwarnings("ignore", message="No ccache found")
    if set(stage_devices(ranks, device)) == {"cpu"} and "FLAGS_use_stride_kernel" not in os.environ:
        import paddle

        # A transposed tensor is a view, which every product first copies with a slow CPU kernel.
        paddle.set_flags({"FLAGS_use_stride_kernel": False})


def stage_devices(ranks: int, device: str) -> list[str]:
    """One device per process of this host, by Paddle's names: "cpu", "gpu:0", or those of a plugin,
    "npu:0"; neighbours share one where there are fewer. Raises ValueError.
    """
    if device == "cpu":
        return ["cpu"] * ranks  # without asking CUDA, which does not survive the fork of the ranks
    import paddle

    plugins = [] if paddle.is_compiled_with_cuda() else paddle.device.get_all_custom_device_type()
    kind, count = (plugins or ["gpu"])[0], paddle.device.device_count()
    if device == "cuda" and (kind != "gpu" or not count):
        raise ValueError("device = cuda, but this Paddle sees no CUDA device; expected cpu or auto")
    return [f"{kind}:{i}" for i in gpus_of_stages(ranks, count)] if count else ["cpu"] * ranks


def check_dtype(dtype: str) -> None:
    """Raise ValueError, after a try, for a precision in which the model cannot run on this device.

    Paddle's CPU kernels have bfloat16 for copies and products by element, and for nothing that a
    Transformer consists of; its CUDA kernels have it for all. To cast to float32 and back around
    every operation would be float32 with other rounding, so that is not done.
    """
    if dtype != "bfloat16":
        return
    import paddle
    from paddle.nn import functional

    x, full = paddle.ones([2, 2]).astype(dtype), paddle.ones([2])
    operations = {
        "matmul": lambda: paddle.matmul(x, x),
        "add": lambda: x + x,
        "gelu": lambda: functional.gelu(x),
        "softmax": lambda: functional.softmax(x),
        "layer_norm": lambda: functional.layer_norm(x, [2], full, full),  # float32 weights
    }
    missing = [name for name, operation in operations.items() if not _runs(operation)]
    if missing:
        where = f"Paddle {paddle.__version__} on {paddle.device.get_device()}"
        raise ValueError(
            f"dtype = bfloat16: {where} has no kernel for {', '.join(missing)}; expected float32 "
            "or float64"
        )


def _runs(operation: Callable[[], Any]) -> bool:
    try:
        operation()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def best_track(config: RunConfig) -> dict[str, Any]:
    """Return the part of `environment` that says what the track "best" does and leaves out."""
    from paddle_impl.programs import static_units  # which imports Paddle

    used = (
        "used"
        if static_units(config)
        else "not used with dropout, recomputation, shards, bfloat16, a split backward, "
        "micro-batches of two sizes or fleet's own loop"
    )
    names = ("oneDNN", "scaled_dot_product_attention")
    said = [
        f"jit.to_static: {used}",
        *(f"{name}: not used, see docs/frameworks.md" for name in names),
    ]
    return {"track": config.track, "best": said if config.track == "best" else []}


def environment(used: Sequence[str]) -> dict[str, Any]:
    """Versions, threads and flags as Paddle reports them, and what the stages' devices are."""
    import paddle

    kind = used[0].partition(":")[0]
    cpu_kernels = f"MKL {mkl.kernels()}" if mkl.kernels() else "not known"
    return {
        "framework": "paddle",
        "version": paddle.__version__,
        "python": platform.python_version(),
        "device_kind": "cuda" if kind == "gpu" else kind,
        "device_name": cpu_name() if kind == "cpu" else _gpu_name(kind),
        "threads_per_stage": _cpu_threads(),
        "tf32": kind == "gpu" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0",
        "onednn": _flag("FLAGS_use_onednn"),
        "kernels": {"cpu": cpu_kernels, "gpu": "cuBLAS"}.get(kind, "the plugin's"),
        "strided_views": _flag("FLAGS_use_stride_kernel"),
        "default_dtype": paddle.get_default_dtype(),
    } | ({} if kind == "cpu" else _gpu_environment(used))


def _gpu_environment(used: Sequence[str]) -> dict[str, Any]:
    """What only a run on GPUs has."""
    import paddle

    from paddle_impl.groups import here

    return {
        "stage_devices": list(used),
        "driver": next((gpu.driver for gpu in visible_gpus()), "unknown"),
        "cuda": paddle.version.cuda(),
        "nccl": paddle.version.nccl(),
        "messages": "sockets" if here().through_host else "the GPUs' own library",
    }


def _gpu_name(kind: str) -> str:
    import paddle

    return str(paddle.device.cuda.get_device_name()) if kind == "gpu" else kind


def _flag(name: str) -> Any:
    import paddle

    return paddle.get_flags(name)[name]


def _cpu_threads() -> int | None:
    """What the OpenMP runtime under Paddle says; Paddle's flag does not follow `set_threads`."""
    import paddle

    library = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    return ctypes.CDLL(str(library)).omp_get_max_threads() if library.exists() else None
