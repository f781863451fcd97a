"""What is decided about GPUs, from lists that are given; and a training on fake ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config  # no public name for what turns it off again

from common.schedule.generators import make_schedule
from common.spec.gpus import Gpu
from tests.engines import Make, batch, different, small, train
from tests.tensorflow.on_fake_gpus import OPTIONS, SCHEDULE, STAGES, STEPS
from tf_impl import clock, devices, gpus

H200, SMALL, UNKNOWN = (Gpu("", memory * 2**20, "580") for memory in (143_771, 24_576, 0))


@pytest.mark.parametrize(
    ("cards", "stages", "limits"),
    [
        ([H200], 1, []),  # nothing is shared
        ([H200, H200], 2, []),
        ([H200], 2, [[64_696, 64_696]]),
        ([H200, SMALL], 3, [[64_696, 64_696], [11_059, 11_059]]),
        ([SMALL, UNKNOWN], 3, []),
        ([], 2, []),  # no driver answers
    ],
)
def test_stages_that_share_a_gpu_have_limits(
    cards: list[Gpu], stages: int, limits: list[list[int]]
) -> None:
    assert gpus.memory_limits(cards, stages) == limits


@pytest.mark.parametrize(
    ("each", "cards", "stages", "expected"),
    [
        (1, 2, 2, [0, 1]),
        (1, 4, 2, [0, 1]),
        (1, 2, 4, [0, 0, 1, 1]),  # the memory is unknown: neighbours share a device
        (2, 2, 4, [0, 1, 2, 3]),
        (2, 2, 3, [0, 1, 2]),
        (2, 2, 2, [0, 2]),  # a job with fewer stages than its process can have
        (2, 5, 7, [0, 1, 2, 4, 5, 6, 8]),
    ],
)
def test_neighbours_share_a_gpu(each: int, cards: int, stages: int, expected: list[int]) -> None:
    logical = [f"GPU:{i}" for i in range(each * cards)]
    assert gpus.dealt(logical, cards, stages) == [f"GPU:{i}" for i in expected]


@pytest.mark.parametrize(
    ("known", "stages", "divided"),
    [
        (2, 4, {"A": [64_696, 64_696], "B": [64_696, 64_696]}),
        (2, 2, {}),
        (2, 1, {}),
        (1, 4, {}),  # the driver shows fewer GPUs than TensorFlow sees: who knows which
    ],
)
def test_gpus_are_taken_divided_and_deterministic(
    known: int, stages: int, divided: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    parts: dict[str, list[int]] = {}

    def divide(card: str, own: list[Any]) -> None:
        parts[card] = [part.memory_limit for part in own]

    monkeypatch.setattr(gpus.os, "environ", seen)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: (H200,) * known)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["A", "B"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *given: seen.update(visible=given))
    monkeypatch.setattr(tf.config, "set_logical_device_configuration", divide)
    monkeypatch.setattr(tf.config, "set_soft_device_placement", lambda on: seen.update(soft=on))
    monkeypatch.setattr(
        tf.config.experimental, "enable_op_determinism", lambda: seen.update(deterministic=True)
    )
    gpus.configure(stages)
    assert parts == divided
    assert seen == {
        "visible": (["A", "B"][:stages], "GPU"),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "deterministic": True,
        "soft": True,
    }


def test_on_the_cpu_the_gpus_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[tuple[Any, str]] = []
    for name in ("set_logical_device_configuration", "set_soft_device_placement"):
        monkeypatch.setattr(tf.config, name, lambda *arguments: None)
    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, lambda count: None)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *given: hidden.append(given))
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", None)  # not on a CPU
    monkeypatch.setattr(
        tf.config, "get_visible_devices", lambda kind: [] if hidden else ["GPU:0", "GPU:1"]
    )
    devices.configure(2, 2, "cpu")
    assert hidden == [([], "GPU")]
    assert all("CPU" in device for device in devices.stage_devices(2, "auto"))
    with pytest.raises(ValueError, match="sees no GPU"):
        devices.stage_devices(2, "cuda")


def test_times_take_a_wait_for_every_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, negative = [], tf.negative

    def counted(x: tf.Tensor) -> tf.Tensor:
        waits.append(x.device)
        return negative(x)

    monkeypatch.setattr(tf, "negative", counted)
    watch = clock.StreamClock("CPU:1")
    marks = [watch.mark(), watch.mark()]
    assert len(waits) == 2 and all("CPU:1" in device for device in waits)
    assert [watch.seconds(mark) for mark in marks] == sorted(marks)


def test_what_has_no_kernel_is_named_with_its_types() -> None:
    @tf.function(input_signature=[tf.TensorSpec((2,), tf.string)])
    def of_text(x: tf.Tensor) -> tf.Tensor:
        return tf.strings.lower(tf.identity(x))

    graph = of_text.get_concrete_function().graph
    assert gpus.without_kernel([graph]) == ["StringLower (string)"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_training_on_fake_gpus_gives_the_bits_of_the_cpu(make: Make, tmp_path: Path) -> None:
    headers = tf.sysconfig.get_include()
    source, library = Path(__file__).with_name("fake_gpu.c"), tmp_path / "fake_gpu.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)],
        check=True,
    )
    module, file = "tests.tensorflow.on_fake_gpus", tmp_path / "trained.npz"
    subprocess.run(
        [sys.executable, "-m", module, str(library), str(file)],
        # The plugin is loaded by a TensorFlow that `configure` has not set up yet.
        env=os.environ | {"FAKE_GPUS": "2", "TF_ENABLE_ONEDNN_OPTS": "0"},
        check=True,
    )
    said = json.loads(file.with_suffix(".json").read_text())
    environment = said["environment"]
    assert (environment["device_kind"], environment["device_name"]) == ("cuda", "FAKE_GPU")
    assert environment["stage_devices"] == ["GPU:0", "GPU:0", "GPU:1"]
    assert "MatMul (float32)" in environment["without_gpu_kernel"]
    assert said["weights on"] == [True] * STAGES and said["visible"] == 2 and said["deterministic"]
    assert said["peaks"].keys() == {"0", "2"}  # those of the GPUs, under the first stage of each
    for stage, peak in said["peaks"].items():
        assert 0 < said["peaks after a reset"][stage] < peak
    schedule = make_schedule(SCHEDULE, STAGES, small("tensorflow").train.micro_batches)
    assert said["actions"] == {str(d): len(row) for d, row in enumerate(schedule.devices)}
    config.enable_op_determinism()  # as on GPUs: some CPU kernels sum in another order then
    try:
        engine = make(STAGES, SCHEDULE, **OPTIONS)
        on_cpu = train(engine, range(STEPS)) | {"held-out loss": engine.evaluate(batch(engine))}
    finally:
        config.disable_op_determinism()
    with np.load(file) as found:
        assert different(dict(found), on_cpu) == []
