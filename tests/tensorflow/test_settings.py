"""Settings, read back; and what is refused where they do not allow it."""

from __future__ import annotations

import pytest
import tensorflow as tf

from tests.engines import small
from tf_impl import devices
from tf_impl.engine import build_engine


def test_the_environment_is_the_parity_one() -> None:
    seen = devices.environment(devices.stage_devices(2, "cpu"))
    assert (seen["onednn"], seen["tf32"], seen["graph_rewrites"]) == (False, False, False)
    assert seen["threads_per_stage"] == 1


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no GPU"):
        devices.stage_devices(1, "cuda")


def test_tensorflow_has_no_pipeline_of_its_own() -> None:
    with pytest.raises(ValueError, match="TensorFlow has no pipeline of its own"):
        build_engine(small("tensorflow", 2, run={"executor": "native"}))
