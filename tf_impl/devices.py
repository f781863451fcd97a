"""Everything that must be set before TensorFlow starts, and what it says afterwards.

TensorFlow reads its environment on import and fixes devices and thread pools with the first
operation, so `configure` runs first and imports TensorFlow itself.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from common.runtime.cpus import threads_per_stage
from common.spec.gpus import gpus_of_stages, visible_gpus
from common.spec.run import RunConfig
from tf_impl import gpus
from tf_impl.executors import one_core_per_stage


def choose_kernels(track: str = "matched", onednn: bool = False) -> None:
    """Set what TensorFlow reads when it is imported. As for `configure`, which does so itself."""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1" if onednn or track == "best" else "0"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's, for `visible_gpus`


def configure(
    stages: int,
    threads: int | None = None,
    device: str = "auto",
    track: str = "matched",
    onednn: bool = False,
) -> None:
    """Make one logical device per stage, or `stages` of them for all shards of all stages; on CPU
    each has `threads // stages` threads (default: all usable CPUs).

    For parity oneDNN and TF32 are off, and so are the graph rewrites of Grappler: they merge
    operations across units (additions of the residual stream, for one), so that bits would depend
    on where the model is cut. On the track "best" oneDNN is on, and so it is where it is asked for.
    (Differs: PyTorch and Paddle choose the track per engine, TensorFlow per process.)

    Raises ValueError if `device` is "cuda" and TensorFlow sees no GPU.
    """
    choose_kernels(track, onednn)
    import tensorflow as tf

    # a stage's functions are many by design, and each is traced once
    tf.get_logger().setLevel("ERROR")
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    own_threads = threads_per_stage(stages, threads)
    tf.config.threading.set_intra_op_parallelism_threads(own_threads)
    # A function on one thread still starts on the pool's; with two a stage none ever waits.
    tf.config.threading.set_inter_op_parallelism_threads(
        2 * stages if own_threads == 1 else own_threads
    )
    if _kind(device) == "GPU":
        gpus.configure(stages)
        return
    # Otherwise TensorFlow would start CUDA on every GPU and put on the first one whatever is not
    # placed: the batch, for one.
    tf.config.set_visible_devices([], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(stages)]
    )


def _kind(device: str) -> str:
    """ "CPU" or "GPU" for the request "auto", "cpu" or "cuda". Raises ValueError."""
    import tensorflow as tf

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {device!r}; expected auto, cpu or cuda")
    has_gpu = bool(tf.config.get_visible_devices("GPU"))  # none once `configure` has hidden them
    if device == "cuda" and not has_gpu:
        raise ValueError("device = 'cuda', but TensorFlow sees no GPU; expected 'cpu' or 'auto'")
    return "GPU" if has_gpu and device != "cpu" else "CPU"


def stage_devices(stages: int, device: str = "auto") -> list[str]:
    """Return each stage's logical device; neighbours share a GPU. Raises ValueError for too few."""
    import tensorflow as tf

    kind = _kind(device)
    found = [logical.name for logical in tf.config.list_logical_devices(kind)]
    if kind == "GPU":
        return gpus.dealt(found, len(tf.config.get_visible_devices("GPU")), stages)
    if len(found) < stages:
        raise ValueError(
            f"{stages} stages need {stages} logical devices, TensorFlow has {len(found)}; expected "
            f"tf_impl.devices.configure(stages={stages}) before the first TensorFlow operation"
        )
    return found[:stages]


def best_track(config: RunConfig) -> dict[str, Any]:
    """Return the part of `environment` that says what the track "best" does and leaves out."""
    said = [
        "oneDNN: used",
        "XLA: not used, see docs/frameworks.md",
        "Grappler: not used, see docs/frameworks.md",
    ]
    return {"track": config.track, "best": said if config.track == "best" else []}


def environment(used: Sequence[str]) -> dict[str, Any]:
    """Versions, threads and flags as TensorFlow reports them, and what the stages' devices are."""
    import keras
    import tensorflow as tf

    on_gpus = "GPU" in used[0]
    cpu_kernels = "Eigen and oneDNN" if _has_onednn() else "Eigen"
    return {
        "framework": "tensorflow",
        "version": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        "device_kind": "cuda" if on_gpus else "cpu",
        "device_name": _gpu_name() if on_gpus else platform.processor() or platform.machine(),
        "logical_devices": list(used),
        "threads_per_stage": tf.config.threading.get_intra_op_parallelism_threads(),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "one_core_per_stage": one_core_per_stage(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "onednn": _has_onednn(),
        "kernels": "cuBLAS" if on_gpus else cpu_kernels,
        "graph_rewrites": not tf.config.optimizer.get_experimental_options().get(
            "disable_meta_optimizer", False
        ),
    } | (_gpu_environment(used) if on_gpus else {})


def _gpu_environment(used: Sequence[str]) -> dict[str, Any]:
    """What only a run on GPUs has."""
    import tensorflow as tf

    cards = gpus_of_stages(len(used), len(tf.config.get_visible_devices("GPU")))
    return {
        "stage_devices": [f"GPU:{card}" for card in cards],
        "driver": next((gpu.driver for gpu in visible_gpus()), "unknown"),
        "cuda": tf.sysconfig.get_build_info().get("cuda_version"),
    }


def _gpu_name() -> str:
    import tensorflow as tf

    gpu = tf.config.get_visible_devices("GPU")[0]
    return str(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name))


def _has_onednn() -> bool:
    """As TensorFlow read its environment, which it does once."""
    from tensorflow.python.util import _pywrap_util_port  # no public name

    return bool(_pywrap_util_port.IsMklEnabled())
