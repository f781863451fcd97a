"""The peak that MFU is a share of."""

from __future__ import annotations

from common.harness.peak import Probe


def test_pytorch_measures_the_peak_that_numpy_cannot() -> None:
    rate, by = Probe("bfloat16", 1, "cpu").measure()
    assert rate is not None and rate > 1e6 and by.startswith("PyTorch")
