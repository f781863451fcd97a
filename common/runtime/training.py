"""Train in a worker process: starting weights, steps, checkpoints, and tensors for parity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.checkpoint import CheckpointError, CheckpointWriter
from common.io.edges import write_file
from common.runtime.agreement import check_lines
from common.runtime.engine import Arrays, Engine
from common.runtime.executor import Event
from common.runtime.faults import Fault
from common.runtime.job import EventRecord, Job, Saving, StepRecord
from common.runtime.watch import Watch
from common.spec.data import Batch, Corpus
from common.spec.mesh import Mesh
from common.spec.parameters import (
    TensorKey,
    initial_weights,
    parameter_shapes,
    random_arrays,
    unit_names,
    unit_of,
)
from common.spec.run import RunConfig

EVENTS_KEPT = 500
"""A run that saves checkpoints may be long: it keeps the events of so many last steps."""
OPTIMIZER_TEST_SEED = 1
NOISE_SEED = 2


class NotFiniteError(ArithmeticError):
    """A loss or gradient norm that is not finite; names the step and the first such tensor."""


def start(engine: Engine, job: Job, corpus: Corpus) -> int:
    """Load weights, and moments to go on; return the first step. Raises CheckpointError."""
    if job.resume is None:
        engine.reset(starting_weights(job))
        return 0
    saved = checkpoint.load(Path(job.resume), with_moments=not job.weights_alone)
    manifest = saved.manifest.without_training() if job.weights_alone else saved.manifest
    position = manifest.data
    different = checkpoint.differences(manifest, job.config)
    # The parent has checked both before, but a job file may be written by hand.
    if position is not None and position.corpus_digest != corpus.digest:
        different.append("corpus: the checkpoint was trained on another text")
    if saved.manifest.tokenizer_digest not in (None, corpus.tokenizer_digest):
        different.append("tokenizer: the checkpoint has another one")
    if different:
        raise CheckpointError(f"{job.resume}: {different[0]}")
    # In another precision than the checkpoint's where a training starts from weights alone.
    master = job.config.train.master_dtype
    engine.reset({name: w.astype(master, copy=False) for name, w in saved.weights.items()})
    if manifest.steps_done:
        engine.load_optimizer_state(saved.optimizer_state, manifest.steps_done)
    return manifest.steps_done


def starting_weights(job: Job) -> Arrays:
    """Return the initial weights of a job: the same for every framework, partition and schedule."""
    model, train = job.config.model, job.config.train
    weights = initial_weights(model, train.seed, train.master_dtype)
    if job.noise:
        noise = random_arrays(model, NOISE_SEED, train.master_dtype, job.noise)
        # Through float32, so that float64 runs start from the same values.
        noisy = {name: (w + noise[name]).astype(np.float32) for name, w in weights.items()}
        weights = {name: w.astype(train.master_dtype) for name, w in noisy.items()}
    return weights


def optimizer_test_gradients(config: RunConfig) -> Arrays:
    """Return the gradients that every implementation applies once, to compare optimizers alone."""
    return random_arrays(config.model, OPTIMIZER_TEST_SEED, config.train.master_dtype, 0.1)


def probe(engine: Engine, job: Job, corpus: Corpus, weights: Arrays) -> dict[TensorKey, Any]:
    """Record activations, and weights after a step from a given gradient; then start over."""
    # The gradients are the same given ones in every framework: were they each framework's own, a
    # difference after the step could be the backward's as well as the optimizer's.
    arrays = dict(engine.unit_outputs(corpus.training_batch(job.config, 0)))
    engine.set_gradients(optimizer_test_gradients(job.config))
    engine.apply_gradients(0)
    arrays |= named(job.config, engine, engine.weights(), 0, "optimizer")
    engine.reset(weights)
    return arrays


def train(
    engine: Engine,
    job: Job,
    corpus: Corpus,
    arrays: dict[TensorKey, Any],
    first_step: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[StepRecord]:
    """Do the steps from `first_step` on. Raises NotFiniteError (if asked) and CheckpointError."""
    config, out = job.config, Path(job.out)
    fault = Fault.parse(job.fault) if job.fault else None
    watch = Watch(Path(job.board or out), engine.devices, fault)
    engine.on_action = watch.on_action
    end = config.train.steps if job.stop_at is None else job.stop_at
    records = []
    for step in range(first_step, end):
        batch = corpus.training_batch(config, step)
        watch.enter("schedule", step)
        start = time.perf_counter()
        loss = engine.forward_backward(batch)  # the mean over the mini-batch's tokens
        seconds = time.perf_counter() - start
        # The clock stands while gradients are copied out: a step's time is what trains.
        if step == 0:
            arrays |= named(config, engine, engine.gradients(), 0, "backward")
        if job.must_be_finite and not math.isfinite(loss):
            raise _not_finite(engine, job, batch, f"the loss is {loss}")
        watch.enter("optimizer", step)
        start = time.perf_counter()
        norm = engine.apply_gradients(step)
        seconds += time.perf_counter() - start
        if job.must_be_finite and not math.isfinite(norm):
            what = f"the gradient norm is {norm}"
            raise _not_finite(engine, job, batch, what, loss_is_finite=True)
        events = {device: list(map(_record, done)) for device, done in engine.events().items()}
        record = StepRecord(
            step=step, loss=loss, gradient_norm=norm, seconds=seconds, events=events
        )
        records.append(record)
        # A long run's events would fill the memory; a report needs only those of one step.
        if job.saving is not None and len(records) > EVENTS_KEPT:
            records[-1 - EVENTS_KEPT].events.clear()
        # One process speaks for all: every process has the same loss, since they exchange it.
        if 0 in engine.devices:
            with (out / "progress.jsonl").open("a", encoding="utf-8") as progress:
                progress.write(json.dumps(record.model_dump(exclude={"events"})) + "\n")
        on_step(step, loss)
        done, saving = step + 1, job.saving
        if saving and (done == end or (saving.every and done % saving.every == 0)):
            watch.enter("save", step)
            _save(engine, job, saving, corpus, batch)
    watch.enter("end", end)
    if (mesh := Mesh.of(config)).lines > 1 and not job.in_one_process:
        rank = mesh.pipeline(job.line)[engine.devices[0]]
        check_lines(mesh, rank, engine.weights(), end, engine.sum_over_ranks)
    return records


def _record(event: Event) -> EventRecord:
    times = {name: getattr(event, name) for name in EventRecord.model_fields if name != "action"}
    return EventRecord(action=str(event.action), **times)


def _save(engine: Engine, job: Job, saving: Saving, corpus: Corpus, batch: Batch) -> None:
    """Raises NotFiniteError rather than save what is not finite: an engine that does not clip need
    not know its norm.
    """
    weights, state = engine.weights(), engine.optimizer_state()
    if job.must_be_finite and any(map(_is_bad, [*weights.values(), *state.values()])):
        what = "the weights after it are not finite"
        raise _not_finite(engine, job, batch, what, loss_is_finite=True)
    if job.line != 0:  # a shard, whose part line 0 has just joined
        return
    writer = CheckpointWriter(Path(saving.directory), saving.keep, saving.token, saving.depot)
    held = (engine.devices, weights, state)
    said, tokenizer = engine.environment(), corpus.tokenizer
    writer.write(job.config, batch.step + 1, corpus.digest, *held, said, tokenizer)


def _not_finite(
    engine: Engine, job: Job, batch: Batch, what: str, loss_is_finite: bool = False
) -> NotFiniteError:
    """The error, after a note of this process' first tensor that is not finite, for the parent.

    The weights come first, since all that follows inherits from them; then the outputs of the
    units; then the gradients, from the head backwards. Once a step was made (`loss_is_finite`),
    only the gradients are still those of before it.
    """
    # Every process notes its own first tensor with its place, and the smallest place of all notes
    # is the very first: (0, 4) is the fifth weight, (1, 2, 0) unit 2's output for micro-batch 0,
    # (2, -7) the gradient of the eighth parameter, which the backward reaches before the seventh's.
    units = unit_names(job.config.model)
    order = {name: i for i, name in enumerate(parameter_shapes(job.config.model))}
    found: list[tuple[tuple[int, ...], str]] = [
        ((3 if loss_is_finite else 0, order[name]), f"weight {name}")
        for name, array in engine.weights().items()
        if _is_bad(array)
    ]
    for key, array in engine.unit_outputs(batch).items() if not loss_is_finite else ():
        if _is_bad(array):
            place = (1, units.index(key.unit), key.micro_batch)
            found.append((place, f"output of {key.unit} for micro-batch {key.micro_batch}"))
    found += [
        ((2, -order[name]), f"gradient of {name}")
        for name, array in engine.gradients().items()
        if _is_bad(array)
    ]
    first = min(found, default=((4,), "none that this process has"))
    note = {"step": batch.step, "what": what, "order": first[0], "tensor": first[1]}
    write_file(Path(job.out) / f"not-finite-{engine.devices[0]}.json", json.dumps(note))
    return NotFiniteError(
        f"step {batch.step + 1}: {what}; the first tensor that is not finite: {first[1]}"
    )


def _is_bad(array: NDArray[Any]) -> bool:
    return not bool(np.isfinite(array).all())


def held_out_batch(config: RunConfig, corpus: Corpus) -> Batch:
    """Return the mini-batch that every run is evaluated on at its end."""
    seed = config.train.seed
    batch = corpus.held_out_batch(0, seed, config.train.batch_size, config.model.context_length)
    return corpus.masked(batch, config.model, (seed, 4))


def named(
    config: RunConfig, engine: Engine, arrays: Arrays, step: int, phase: str
) -> dict[TensorKey, Any]:
    """Return keys for tensors that belong to the whole mini-batch."""
    stage = engine.devices[0] if len(engine.devices) == 1 else -1
    return {
        TensorKey(step, phase, stage, -1, unit_of(name), name): value
        for name, value in arrays.items()
    }
