"""Skips this folder where Paddle is not installed; else sets Paddle up for its tests, as `paddle_impl` does for a run."""

import pytest

import paddle_impl.devices  # before Paddle: its package chooses the kernels of Paddle's MKL

pytest.importorskip("paddle")
paddle_impl.devices.configure(stages=1, threads=1, device="cpu")
