"""The kernels that `triptych doctor` measures."""

from __future__ import annotations

import pytest

from paddle_impl.roofline import prepare
from tests.kernels import check_kernels


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_runs_under_its_name(dtype: str) -> None:
    check_kernels(prepare, "paddle", dtype)
