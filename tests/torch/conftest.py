"""Skips this folder where PyTorch is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from tests.engines import Make, maker
from torch_impl import devices

devices.configure(4, 4, "cpu")


@pytest.fixture
def make() -> Iterator[Make]:
    from torch_impl.engine import build_engine  # after `configure`, since it imports PyTorch

    yield from maker("torch", build_engine)
