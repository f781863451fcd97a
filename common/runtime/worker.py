"""The child side of a run: builds the engine, does the job, writes what it saw. Shared by all implementations."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.data import load_corpus
from common.parity import TensorKey
from common.runtime.dumping import dump
from common.runtime.engine import Engine
from common.runtime.job import Job, JobFile, Part
from common.runtime.training import held_out_batch, named, probe, start, starting_weights, train
from common.spec import RunConfig

Switch = Callable[[RunConfig], AbstractContextManager[Any]]


def no_drift(config: RunConfig) -> AbstractContextManager[Any]:
    """For engines that have none of a framework's habits."""
    return nullcontext()


def run_jobs(
    jobs: JobFile, build_engine: Callable[[RunConfig], Engine], first_device: int = 0, switch: Switch = no_drift
) -> int:
    """Runs every job; a failed one leaves its traceback and the next go on. Returns the exit status.

    `switch` puts back the habit of the framework that `RunConfig.drift` names, for one job.
    """
    status = 0
    for job in jobs.jobs:
        try:
            with switch(job.config):
                _run_job(job, build_engine)
        except Exception:
            status = 1
            text = traceback.format_exc()
            (Path(job.out) / f"failed-{first_device}.txt").write_text(text)
            print(text, flush=True)
    return status


def _run_job(job: Job, build_engine: Callable[[RunConfig], Engine]) -> None:
    config, out = job.config, Path(job.out)
    corpus = load_corpus(config)
    began = time.perf_counter()
    engine = build_engine(config)
    try:
        first_step = start(engine, job, corpus)
        build_seconds = time.perf_counter() - began
        arrays: dict[TensorKey, Any] = {}
        if job.kind == "probe":
            arrays |= probe(engine, job, corpus, starting_weights(job))
        steps = train(engine, job, corpus, arrays, first_step)
        if job.kind == "probe":
            arrays |= named(config, engine, engine.weights(), config.train.steps, "trained")
        if job.kind == "dump":
            arrays = dump(engine, job, corpus)
        part = Part(
            devices=engine.devices,
            steps=steps,
            held_out_loss=engine.evaluate(held_out_batch(config, corpus)),
            build_seconds=build_seconds,
            peak_memory_bytes=engine.peak_memory_bytes(),
            held_activation_peak_bytes=engine.held_bytes_peak(),
            in_flight_peak=engine.in_flight_peak(),
            environment=engine.environment(),
            corpus_digest=corpus.digest,
            corpus_bytes=corpus.num_bytes,
        )
        first = engine.devices[0]
        save_file(
            {str(key): np.ascontiguousarray(value) for key, value in arrays.items()}, out / f"part-{first}.safetensors"
        )
        # Last, so that a part file says that the job ended well.
        (out / f"part-{first}.json").write_text(part.model_dump_json())
    finally:
        engine.close()
