"""Stages on GPUs: which logical device each one has, their memory, and what has no GPU kernel.

A logical device is a part of a GPU with a memory limit, an allocator and a stream of its own:

    stages      0        1        2        3        4       neighbours share a GPU: `gpus_of_stages`
    GPUs        0        0        0        1        1
    logical     GPU:0    GPU:1    GPU:2    GPU:3    GPU:4   (and GPU:5, which nobody has)

Differs: only TensorFlow divides a GPU. PyTorch's stages have a stream each and one allocator, and
its `gpus.py` answers `triptych doctor`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common.spec.gpus import Gpu, gpus_of_stages, visible_gpus

USED_PERCENT = 90
"""Of a GPU's memory, for all stages on it: CUDA and its libraries need some beside them."""
ON_HOST = ("Placeholder", "NoOp")
"""Operations that compute nothing: the placer puts them anywhere."""


def configure(stages: int) -> None:
    """Take as many GPUs as there are stages, divide those that are shared, and compute the same
    bits every time. TensorFlow must not have started.
    """
    import tensorflow as tf

    cards = tf.config.list_physical_devices("GPU")[:stages]
    tf.config.set_visible_devices(cards, "GPU")
    known = visible_gpus()
    limits = memory_limits(known[: len(cards)], stages) if len(known) >= len(cards) else []
    for card, own in zip(cards, limits, strict=False):
        parts = [tf.config.LogicalDeviceConfiguration(memory_limit=limit) for limit in own]
        tf.config.set_logical_device_configuration(card, parts)
    # By the environment and not by `set_memory_growth`, which refuses a GPU that is divided.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    # Atomic additions on a GPU come in any order. On the CPU the kernels that we use are
    # deterministic by themselves, and the setting would make Keras' users set seeds.
    tf.config.experimental.enable_op_determinism()
    # An operation without a GPU kernel runs on the CPU (`without_kernel`), not at all otherwise.
    tf.config.set_soft_device_placement(True)


def memory_limits(cards: Sequence[Gpu], stages: int) -> list[list[int]]:
    """Return the limits of every GPU's logical devices in MiB; nothing where no GPU has to be
    divided, or one does not say how much memory it has: its stages then have one device together.
    """
    if not cards or stages <= len(cards) or not all(card.memory_bytes for card in cards):
        return []
    # As many on every GPU: a job with fewer stages may have more on one than this job has.
    parts = -(-stages // len(cards))
    return [[card.memory_bytes * USED_PERCENT // 100 // parts // 2**20] * parts for card in cards]


def dealt(logical: Sequence[str], cards: int, stages: int) -> list[str]:
    """Return each stage's logical device: the next on its GPU; all `cards` have as many."""
    each = len(logical) // cards
    places = gpus_of_stages(stages, cards)
    return [
        logical[card * each + places[:stage].count(card) % each]
        for stage, card in enumerate(places)
    ]


def peaks(devices: Sequence[str]) -> dict[int, int]:
    """Return the most bytes that were allocated on each GPU of `devices`, under its first stage."""
    import tensorflow as tf

    info = tf.config.experimental.get_memory_info
    return {devices.index(name): info(_short(name))["peak"] for name in _gpus(devices)}


def reset_peaks(devices: Sequence[str]) -> None:
    """Forget what was allocated so far."""
    import tensorflow as tf

    for name in _gpus(devices):
        tf.config.experimental.reset_memory_stats(_short(name))


def _gpus(devices: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(devices) if "GPU" in name]


def _short(device: str) -> str:
    """ "GPU:0" for "/job:localhost/replica:0/task:0/device:GPU:0"."""
    return device.rsplit("device:", 1)[-1]


def without_kernel(graphs: Iterable[Any]) -> list[str]:
    """Return the operations of `graphs` that this TensorFlow has no GPU kernel for, with their
    types; they run on the CPU, and their tensors are copied to and fro.
    """
    operations = [op for graph in graphs for op in _operations(graph) if op.type not in ON_HOST]
    return sorted({_named(op) for op in operations if not _has_kernel(op)})


def _operations(graph: Any) -> Iterator[Any]:
    yield from graph.get_operations()
    for function in graph._functions.values():  # loops, branches, inner functions
        yield from function.graph.get_operations()


def _has_kernel(op: Any) -> bool:
    from tensorflow.python.framework import kernels  # no public name

    return any(
        kernel.device_type in ("GPU", "DEFAULT")  # DEFAULT: of every kind of device
        and all(_is_allowed(op, constraint) for constraint in kernel.constraint)
        for kernel in kernels.get_registered_kernels_for_op(op.type).kernel
    )


def _is_allowed(op: Any, constraint: Any) -> bool:
    """Whether a kernel that is for some types only is for those of `op`."""
    allowed = set(constraint.allowed_values.list.type)
    value = op.get_attr(constraint.name)
    types = value if isinstance(value, list) else [value]
    return not allowed or all(dtype.as_datatype_enum in allowed for dtype in types)


def _named(op: Any) -> str:
    types = dict.fromkeys(tensor.dtype.name for tensor in (*op.inputs, *op.outputs))
    return f"{op.type} ({', '.join(types)})"
