"""The kernels that `triptych doctor` measures, and the peak that MFU is a share of."""

from __future__ import annotations

import pytest

from common.harness.peak import Probe
from tests.kernels import check_kernels
from torch_impl.roofline import prepare


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_runs_under_its_name(dtype: str) -> None:
    check_kernels(prepare, "torch", dtype)


def test_pytorch_measures_the_peak_that_numpy_cannot() -> None:
    rate, by = Probe("bfloat16", 1, "cpu").measure()
    assert rate is not None and rate > 1e6 and by.startswith("PyTorch")
