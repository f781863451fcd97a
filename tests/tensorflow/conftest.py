"""TensorFlow's devices are set before it starts, for all tests of this folder: three stages on the
CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("tensorflow")

from tests.engines import Make, maker
from tf_impl import devices

devices.configure(stages=3, threads=3, device="cpu")


@pytest.fixture
def make() -> Iterator[Make]:
    from tf_impl.engine import build_engine  # after `configure`, since it imports TensorFlow

    yield from maker("tensorflow", build_engine)
