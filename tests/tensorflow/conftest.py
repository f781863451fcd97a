"""TensorFlow's devices are set before it starts, for all tests of this folder: three stages on the
CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines import Make, maker
from tf_impl import devices

try:  # it imports TensorFlow, once the environment says which kernels to take
    devices.configure(stages=3, threads=3, device="cpu")
except ImportError:
    pytest.skip("TensorFlow is not installed", allow_module_level=True)


@pytest.fixture
def make() -> Iterator[Make]:
    from tf_impl.engine import build_engine  # after `configure`, since it imports TensorFlow

    yield from maker("tensorflow", build_engine)
