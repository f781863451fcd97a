"""The kernels that `triptych doctor` measures."""

from __future__ import annotations

import pytest

from tests.kernels import check_kernels
from tf_impl import devices
from tf_impl.roofline import prepare


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_runs_under_its_name(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorFlow has begun, with the settings of the folder.
    monkeypatch.setattr(devices, "configure", lambda *settings: None)
    check_kernels(prepare, "tensorflow", dtype)
