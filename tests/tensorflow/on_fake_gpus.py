"""`python -m tests.tensorflow.on_fake_gpus LIBRARY FILE`: trains on the GPUs of `fake_gpu.c`,
and writes what came out and what was said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.runtime.job import Job
from common.runtime.training import starting_weights
from tests.engines import batch, small, train

STAGES, SCHEDULE, STEPS = 3, "zb-h1", 2
OPTIONS: dict[str, Any] = {
    # Adam's fused kernel must be where its variables are, and the fake GPUs have no kernels.
    "train": {"optimizer": "sgd", "momentum": 0.9},
    "tied_head": True,
    "dropout": 0.1,
}


def main(library: str, file: str) -> None:
    import tensorflow as tf
    from tensorflow.python.framework import config, load_library  # no public names

    load_library.load_pluggable_device_library(library)
    from tf_impl import devices

    devices.configure(STAGES, STAGES, "cuda")
    from tf_impl.engine import build_engine

    run = {"device": "cuda", "action_times": True}
    engine = build_engine(small("tensorflow", STAGES, SCHEDULE, run=run, **OPTIONS))
    engine.reset(starting_weights(Job(config=engine.config, out="", noise=0.1)))
    arrays = train(engine, range(STEPS)) | {"held-out loss": engine.evaluate(batch(engine))}
    peaks = engine.peak_memory_bytes()
    engine.reset(engine.weights())
    said = {
        "visible": len(tf.config.get_visible_devices("GPU")),
        "weights on": [
            {w.variable.value.device.rsplit(":", 2)[-2] for w in chunk.weights} == {"GPU"}
            for chunk in engine.model.chunks
        ],
        "environment": engine.environment(),
        "deterministic": config.is_op_determinism_enabled(),
        "peaks": peaks,
        "peaks after a reset": engine.peak_memory_bytes(),
        "actions": {d: len(events) for d, events in engine.events().items()},
    }
    np.savez(file, **arrays)
    Path(file).with_suffix(".json").write_text(json.dumps(said))
    engine.model.times_actions = False
    engine.forward_backward(batch(engine))
    assert engine.events() == {}


if __name__ == "__main__":
    main(*sys.argv[1:])
