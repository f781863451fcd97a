"""The worker side of a run: build the engine, do the job, write the results. Shared by all."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.io.edges import write_file
from common.runtime import inherited
from common.runtime.allocator import keep_freed_memory
from common.runtime.dumping import dump
from common.runtime.engine import Engine
from common.runtime.inference import evaluate, generate, load_weights
from common.runtime.installed import build_file, cuda_in
from common.runtime.job import Job, JobFile, Part, StepRecord
from common.runtime.text import open_text
from common.runtime.training import held_out_batch, named, probe, start, starting_weights, train
from common.spec.data import Corpus, load_corpus
from common.spec.gpus import fell_back
from common.spec.parameters import TensorKey
from common.spec.run import RunConfig

STARTED_IN = inherited.report()
"""Read at import, before an implementation sets variables of its own."""

Switch = Callable[[RunConfig], AbstractContextManager[Any]]


def no_drift(config: RunConfig) -> AbstractContextManager[Any]:
    """Do nothing: for engines without any framework's habits."""
    return nullcontext()


def run_jobs(
    jobs: JobFile,
    build_engine: Callable[[RunConfig], Engine],
    first_device: int = 0,
    switch: Switch = no_drift,
    run: Callable[[Job, Callable[[RunConfig], Engine]], Any] | None = None,
) -> int:
    """Run every job and return the exit status.

    A failed job leaves its traceback, and the next one runs.

    `switch` applies, for one job, the framework's habit that `RunConfig.drift` names. `run` stands
    in for `run_job`.
    """
    status = 0
    for job in jobs.jobs:
        try:
            with switch(job.config):
                (run or run_job)(job, build_engine)
        except Exception:
            status = 1
            text = traceback.format_exc()
            write_file(Path(job.out) / f"failed-{first_device}.txt", text)
            print(text, flush=True)
        # An engine is full of rings. Left to Python, several lie about in the heap, and each job
        # was 2 % slower than the one before (TensorFlow, one stage, m = 4).
        gc.collect()
    return status


def run_job(
    job: Job,
    build_engine: Callable[[RunConfig], Engine],
    corpus: Corpus | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Part:
    """Run one job, write what it found, and return it. `corpus` saves reading the text."""
    keep_freed_memory()
    if corpus is None and job.kind != "generate":  # whose prompt comes in tokens
        # What the parent has read; a job file that was written by hand may leave it out.
        corpus = load_corpus(job.config) if job.text is None else open_text(job.text)
    began = time.perf_counter()
    engine = build_engine(job.config)
    try:
        if corpus is None:
            load_weights(engine, job)
            built = time.perf_counter() - began
            generate(engine, job)
            part = _part(job, engine, [], math.nan, built, None)
        elif job.kind == "evaluate":
            load_weights(engine, job)
            built = time.perf_counter() - began
            part = _part(job, engine, [], evaluate(engine, job, corpus).loss, built, corpus)
        else:
            part = _train_job(engine, job, corpus, began, on_step)
        # Last, so that a part file says that the job ended well.
        write_file(Path(job.out) / f"part-{engine.devices[0]}.json", part.model_dump_json())
        return part
    finally:
        engine.close()


def _train_job(
    engine: Engine, job: Job, corpus: Corpus, began: float, on_step: Callable[[int, float], None]
) -> Part:
    """Do a job that trains, and write the tensors of its kind."""
    config = job.config
    first_step = start(engine, job, corpus)
    build_seconds = time.perf_counter() - began
    arrays: dict[TensorKey, Any] = {}
    if job.kind == "probe":
        arrays |= probe(engine, job, corpus, starting_weights(job))
    steps = train(engine, job, corpus, arrays, first_step, on_step)
    if job.kind == "probe":
        arrays |= named(config, engine, engine.weights(), config.train.steps, "trained")
    if job.kind == "dump":
        arrays = dump(engine, job, corpus)
    held_out_loss = engine.evaluate(held_out_batch(config, corpus))
    # safetensors wants tensors in one piece: a transposed view would be saved the wrong way round.
    tensors = {str(key): np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(tensors, Path(job.out) / f"part-{engine.devices[0]}.safetensors")
    return _part(job, engine, steps, held_out_loss, build_seconds, corpus)


def _part(
    job: Job,
    engine: Engine,
    steps: list[StepRecord],
    held_out_loss: float,
    build_seconds: float,
    corpus: Corpus | None,
) -> Part:
    said, config = engine.environment(), job.config
    cuda = cuda_in(build_file(config.framework) or "")
    return Part(
        devices=engine.devices,
        line=job.line,
        steps=steps,
        held_out_loss=held_out_loss,
        build_seconds=build_seconds,
        peak_memory_bytes=engine.peak_memory_bytes(),
        held_activation_peak_bytes=engine.held_bytes_peak(),
        in_flight_peak=engine.in_flight_peak(),
        environment=said | STARTED_IN | fell_back(config.device, said, cuda),
        corpus_digest="" if corpus is None else corpus.digest,
        corpus_bytes=0 if corpus is None else corpus.num_bytes,
        tokenizer_digest="" if corpus is None else corpus.tokenizer_digest,
    )
