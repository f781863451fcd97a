"""What belongs to the process of a stage as a whole: its threads and its peak memory.

Differs: the others' stages share a process. PyTorch's threads are set one by one (`streams.py`),
TensorFlow's before it starts, and their engines say which stages a peak is of.
"""

from __future__ import annotations

from common.runtime.memory import forget_peak_resident, peak_resident_bytes


def set_threads(threads: int) -> None:
    """CPU threads of this process from now on."""
    from paddle.base import core

    core.set_num_threads(threads)


def forget_peak_memory() -> None:
    """Make `peak_memory_bytes` start anew, as for every engine that is built."""
    import paddle

    if paddle.device.get_device() != "cpu":
        paddle.device.reset_max_memory_allocated()
    forget_peak_resident()


def peak_memory_bytes() -> int:
    """GPU: the allocator's peak. CPU: the peak resident size of this process."""
    import paddle

    on_cpu = paddle.device.get_device() == "cpu"
    return peak_resident_bytes() if on_cpu else int(paddle.device.max_memory_allocated())
