"""The worker side of `triptych dump`: everything that one step computes, and every unit by itself.

Two kinds of tensors. Those of the step as it runs carry the errors of all that came before them.
Those of a unit alone do not: the unit gets the float64 oracle's input and output gradient, at the
oracle's weights, so a difference is its own; in the same way the optimizer gets the oracle's
gradients and moments. The oracle's tensors are in the dump as well (phases "reference_*"), so that
any other implementation of the model can be fed with them.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.checkpoint import moments_of
from common.oracle.reference import Oracle
from common.runtime.engine import Arrays, Engine
from common.runtime.job import Job
from common.runtime.training import named, starting_weights
from common.spec.data import Batch, Corpus
from common.spec.parameters import TensorKey, unit_names, unit_of
from common.spec.rounding import in_precision


@dataclass(frozen=True)
class Reference:
    """What the oracle has at one step, in the precision of the run that is fed with it."""

    weights: Arrays
    gradients: Arrays
    moments: Arrays
    """As `Engine.optimizer_state` names them."""
    inputs: Arrays
    """(B, S, D) by unit; none for the embedding."""
    output_gradients: Arrays
    """(B, S, D) by unit; for the head (B, S, V)."""

    def tensors(self, batch: Batch) -> dict[TensorKey, Any]:
        """Return all of it with keys, and the tokens."""
        found = {
            TensorKey(batch.step, "reference_tokens", 0, -1, "embedding", "inputs"): batch.inputs,
            TensorKey(batch.step, "reference_tokens", 0, -1, "head", "targets"): batch.targets,
        }
        for tensor, by_unit in (("input", self.inputs), ("output_gradient", self.output_gradients)):
            for unit, array in by_unit.items():
                found[TensorKey(batch.step, "reference_unit", 0, -1, unit, tensor)] = array
        named = {f"weight/{name}": array for name, array in self.weights.items()}
        named |= {f"gradient/{name}": array for name, array in self.gradients.items()}
        for key, array in (named | self.moments).items():
            kind, name = key.split("/")
            found[TensorKey(batch.step, f"reference_{kind}", 0, -1, unit_of(name), name)] = array
        return found


def reference_at(job: Job, corpus: Corpus, step: int) -> Reference:
    """Train the oracle up to `step` and take that step's forward and backward."""
    config, master = job.config, job.config.train.master_dtype
    trained = Oracle(config.model, config.train, starting_weights(job))
    for earlier in range(step):
        trained.train_step(corpus.training_batch(config, earlier))
    weights: Arrays = {name: value.astype(master) for name, value in trained.weights.items()}
    # From the rounded weights on, so that all that a run is fed with belongs together.
    # In one piece, whatever its size: every gradient of an output is looked at.
    oracle = Oracle(config.model, config.train, weights, piece_bytes=sys.maxsize)
    batch = corpus.training_batch(config, step)
    _, outputs, _ = oracle.forward(batch)
    oracle.forward_backward(batch)
    units = unit_names(config.model)
    return Reference(
        weights=weights,
        gradients={name: value.astype(master) for name, value in oracle.gradients.items()},
        moments={
            f"{moment}/{name}": value.astype(master)
            for moment in moments_of(config.train)
            for name, value in getattr(trained, moment).items()
        },
        inputs={
            unit: in_precision(outputs[before], config.train.dtype)
            for before, unit in itertools.pairwise(units)
        },
        output_gradients={
            unit: in_precision(oracle.output_gradients[unit], config.train.dtype) for unit in units
        },
    )


def dump(engine: Engine, job: Job, corpus: Corpus) -> dict[TensorKey, Any]:
    """Do the step after `Job.stop_at`, then feed every part of it with the oracle's tensors."""
    config, step = job.config, job.stop_at or 0
    batch = corpus.training_batch(config, step)

    def keyed(arrays: Arrays, phase: str) -> dict[TensorKey, Any]:
        return named(config, engine, arrays, step, phase)

    found = keyed(engine.weights(), "before") | engine.unit_outputs(batch)
    loss = engine.forward_backward(batch)
    if 0 in engine.devices:
        found[TensorKey(step, "forward", config.stages - 1, -1, "head", "loss")] = np.array([loss])
    found |= keyed(engine.gradients(), "backward")
    engine.apply_gradients(step)
    found |= keyed(engine.weights(), "after")

    # The same step once more, now with every part fed by the oracle: no error is handed on.
    reference = reference_at(job, corpus, step)
    engine.reset(reference.weights)
    engine.load_optimizer_state(reference.moments, step)
    found |= engine.probe_units(batch, reference.inputs, reference.output_gradients)
    engine.set_gradients(reference.gradients)
    engine.apply_gradients(step)
    found |= keyed(engine.weights(), "optimizer")
    if 0 in engine.devices:
        found |= reference.tensors(batch)
    return found
