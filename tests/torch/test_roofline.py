"""The kernels that `triptych doctor` measures."""

from __future__ import annotations

import pytest

from tests.kernels import check_kernels
from torch_impl.roofline import prepare


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_runs_under_its_name(dtype: str) -> None:
    check_kernels(prepare, "torch", dtype)
