"""When a GPU did what. TensorFlow returns before the GPU is done and shows no events of its
streams, so every time costs a wait.

Differs: PyTorch's times are those of CUDA events, which nobody has to wait for.
"""

from __future__ import annotations

import time

import tensorflow as tf


class StreamClock:
    """The clock of a pass on one GPU (`common.runtime.executor.Clock`)."""

    def __init__(self, device: str) -> None:
        self._device = device
        with tf.device(device):
            self._one = tf.ones(())

    def mark(self) -> float:
        # A stream works in order: once the host has this number, all before it is done. It is
        # computed each time, since a tensor that was read once has a copy on the host.
        with tf.device(self._device):
            tf.negative(self._one).numpy()
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark
