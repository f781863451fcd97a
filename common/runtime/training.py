"""Training in a child process: the steps of a run, and the tensors that a probe leaves for the parity ladder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.data import Batch, Corpus
from common.parity import TensorKey
from common.runtime.engine import Arrays, Engine
from common.runtime.job import EventRecord, Job, StepRecord
from common.spec import RunConfig
from common.weights import initial_weights, random_arrays, unit_of

OPTIMIZER_TEST_SEED = 1
NOISE_SEED = 2


def starting_weights(job: Job) -> Arrays:
    """The initial weights of a job: the same for every framework, partition and schedule."""
    model, train = job.config.model, job.config.train
    weights = initial_weights(model, train.seed, train.master_dtype)
    if job.noise:
        noise = random_arrays(model, NOISE_SEED, train.master_dtype, job.noise)
        # Through float32, so that float64 runs start from the same values.
        weights = {k: (v + noise[k]).astype(np.float32).astype(train.master_dtype) for k, v in weights.items()}
    return weights


def optimizer_test_gradients(config: RunConfig) -> Arrays:
    """The gradients that every implementation applies once, to compare the optimizers alone."""
    return random_arrays(config.model, OPTIMIZER_TEST_SEED, config.train.master_dtype, 0.1)


def probe(engine: Engine, job: Job, corpus: Corpus, weights: Arrays) -> dict[TensorKey, Any]:
    """Activations of step 0, and the weights after one optimizer step from a given gradient; then starts over."""
    arrays = dict(engine.unit_outputs(corpus.training_batch(job.config, 0)))
    engine.set_gradients(optimizer_test_gradients(job.config))
    engine.apply_gradients(0)
    arrays |= named(job.config, engine, engine.weights(), 0, "optimizer")
    engine.reset(weights)
    return arrays


def train(
    engine: Engine, config: RunConfig, corpus: Corpus, out: Path, arrays: dict[TensorKey, Any]
) -> list[StepRecord]:
    records = []
    for step in range(config.train.steps):
        batch = corpus.training_batch(config, step)
        start = time.perf_counter()
        loss = engine.forward_backward(batch)
        seconds = time.perf_counter() - start
        if step == 0:
            arrays |= named(config, engine, engine.gradients(), 0, "backward")
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


def held_out_batch(config: RunConfig, corpus: Corpus) -> Batch:
    """The mini-batch that every run is evaluated on at its end."""
    return corpus.held_out_batch(0, config.train.seed, config.train.batch_size, config.model.context_length)


def named(config: RunConfig, engine: Engine, arrays: Arrays, step: int, phase: str) -> dict[TensorKey, Any]:
    """Keys for tensors that belong to the whole mini-batch."""
    stage = engine.devices[0] if len(engine.devices) == 1 else -1
    return {TensorKey(step, phase, stage, -1, unit_of(name), name): value for name, value in arrays.items()}
