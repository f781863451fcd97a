"""TensorFlow's devices are set before it starts, for all tests of this folder: three stages on the CPU."""

import pytest

pytest.importorskip("tensorflow")

from tf_impl import devices

devices.configure(stages=3, threads=3, device="cpu")
