"""The child side of a run: builds the engine, trains, writes what it saw. Shared by all implementations."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.data import Corpus, load_corpus
from common.parity import TensorKey
from common.runtime.engine import Arrays, Engine
from common.runtime.job import EventRecord, Job, JobFile, Part, StepRecord
from common.spec import RunConfig
from common.weights import initial_weights, random_arrays, unit_of

OPTIMIZER_TEST_SEED = 1
NOISE_SEED = 2


def run_jobs(jobs: JobFile, build_engine: Callable[[RunConfig], Engine], first_device: int = 0) -> int:
    """Runs every job; a failed one leaves its traceback and the next go on. Returns the exit status."""
    status = 0
    for job in jobs.jobs:
        try:
            _run_job(job, build_engine)
        except Exception:
            status = 1
            text = traceback.format_exc()
            (Path(job.out) / f"failed-{first_device}.txt").write_text(text)
            print(text, flush=True)
    return status


def starting_weights(job: Job) -> Arrays:
    """The initial weights of a job: the same for every framework, partition and schedule."""
    model, train = job.config.model, job.config.train
    weights = initial_weights(model, train.seed, train.dtype)
    if job.noise:
        noise = random_arrays(model, NOISE_SEED, train.dtype, job.noise)
        # Through float32, so that float64 runs start from the same values.
        weights = {k: (v + noise[k]).astype(np.float32).astype(train.dtype) for k, v in weights.items()}
    return weights


def optimizer_test_gradients(config: RunConfig) -> Arrays:
    """The gradients that every implementation applies once, to compare the optimizers alone."""
    return random_arrays(config.model, OPTIMIZER_TEST_SEED, config.train.dtype, 0.1)


def _run_job(job: Job, build_engine: Callable[[RunConfig], Engine]) -> None:
    config, out = job.config, Path(job.out)
    corpus = load_corpus(config)
    began = time.perf_counter()
    engine = build_engine(config)
    try:
        weights = starting_weights(job)
        engine.reset(weights)
        build_seconds = time.perf_counter() - began
        arrays: dict[TensorKey, Any] = {}
        if job.kind == "probe":
            arrays |= _probe(engine, job, corpus, weights)
        steps = _train(engine, config, corpus, out, arrays)
        if job.kind == "probe":
            arrays |= _named(config, engine, engine.weights(), config.train.steps, "trained")
        part = Part(
            devices=engine.devices,
            steps=steps,
            held_out_loss=engine.evaluate(_batch(config, corpus, 0, held_out=True)),
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


def _probe(engine: Engine, job: Job, corpus: Corpus, weights: Arrays) -> dict[TensorKey, Any]:
    """Activations of step 0, and the weights after one optimizer step from a given gradient; then starts over."""
    arrays = dict(engine.unit_outputs(_batch(job.config, corpus, 0)))
    engine.set_gradients(optimizer_test_gradients(job.config))
    engine.apply_gradients(0)
    arrays |= _named(job.config, engine, engine.weights(), 0, "optimizer")
    engine.reset(weights)
    return arrays


def _train(
    engine: Engine, config: RunConfig, corpus: Corpus, out: Path, arrays: dict[TensorKey, Any]
) -> list[StepRecord]:
    records = []
    for step in range(config.train.steps):
        batch = _batch(config, corpus, step)
        start = time.perf_counter()
        loss = engine.forward_backward(batch)
        seconds = time.perf_counter() - start
        if step == 0:
            arrays |= _named(config, engine, engine.gradients(), 0, "backward")
        start = time.perf_counter()
        norm = engine.apply_gradients(step)
        seconds += time.perf_counter() - start
        events = {
            device: [
                EventRecord(
                    action=str(event.action),
                    ready_seconds=event.ready_seconds,
                    start_seconds=event.start_seconds,
                    end_seconds=event.end_seconds,
                )
                for event in done
            ]
            for device, done in engine.events().items()
        }
        records.append(StepRecord(step=step, loss=loss, gradient_norm=norm, seconds=seconds, events=events))
        if 0 in engine.devices:
            with (out / "progress.jsonl").open("a") as progress:
                progress.write(json.dumps({"step": step, "loss": loss, "seconds": seconds}) + "\n")
    return records


def _batch(config: RunConfig, corpus: Corpus, step: int, held_out: bool = False) -> Any:
    make = corpus.held_out_batch if held_out else corpus.batch
    return make(step, config.train.seed, config.train.batch_size, config.model.context_length)


def _named(config: RunConfig, engine: Engine, arrays: Arrays, step: int, phase: str) -> dict[TensorKey, Any]:
    """Keys for tensors that belong to the whole mini-batch."""
    stage = engine.devices[0] if len(engine.devices) == 1 else -1
    return {TensorKey(step, phase, stage, -1, unit_of(name), name): value for name, value in arrays.items()}
