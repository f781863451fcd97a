"""The kernels that `triptych doctor` measures."""

from __future__ import annotations

import pytest

from common.roofline import kernels
from common.spec import preset
from tf_impl import devices
from tf_impl.roofline import prepare


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_runs_under_its_name(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        devices, "configure", lambda *settings: None
    )  # TensorFlow has begun, with the folder's settings
    tiny = preset("tiny")
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"dtype": dtype})})
    operations, environment = prepare(one)
    assert list(operations) == [kernel.name for kernel in kernels(one)]
    for operation in operations.values():
        operation()
    assert environment["framework"] == "tensorflow"
