"""The parity tests' measurement: compare what a framework's probe left with the oracle.

A probe (`Job.kind`) leaves the output of every unit for every micro-batch, one optimizer step from
a given gradient, the gradients of step 0, the loss of every step, and the trained weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from common.oracle.limits import Comparison, compare
from common.oracle.reference import Oracle
from common.runtime.job import Job, Part
from common.runtime.training import held_out_batch, optimizer_test_gradients, starting_weights
from common.spec.data import load_corpus
from common.spec.parameters import TensorKey, unit_of
from common.spec.run import RunConfig

Tensors = dict[TensorKey, NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """What one probe left behind, its parts merged."""

    tensors: Tensors
    parts: tuple[Part, ...]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.parts[0].steps]

    @property
    def held_out_loss(self) -> float:
        loss = self.parts[0].held_out_loss
        return np.nan if loss is None else loss

    def phase(self, phase: str) -> Tensors:
        return {key: value for key, value in self.tensors.items() if key.phase == phase}


def read_probe(folder: Path, same_copies: bool = True) -> Run:
    """Read a probe's tensors, merged over its parts.

    Raises ValueError if two stages hold different copies of a tied weight, unless that may be; and
    for a type that NumPy lacks: an engine gives float32 where it computes in bfloat16.
    """
    parts = [
        Part.model_validate_json(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("part-*.json"))  # those of line 0
    ]
    tensors: Tensors = {}
    for path in sorted(folder.rglob("part-*.safetensors")):
        try:
            arrays = load_file(path)
        except TypeError as error:
            raise ValueError(f"{path.name}: {error}") from None
        for text, value in arrays.items():
            key = TensorKey.parse(text)
            # Two stages saved a tied weight, and every replica all weights.
            twin = next((k for k in tensors if k._replace(stage=key.stage) == key), None)
            if same_copies and twin is not None and not np.array_equal(value, tensors[twin]):
                raise ValueError(f"the copies of {key} differ")
            tensors[key] = value
    return Run(tensors, tuple(sorted(parts, key=lambda part: part.devices)))


@dataclass(frozen=True)
class Expected:
    """The oracle's values for a run."""

    unit_outputs: Tensors
    gradients: Tensors
    optimizer: Tensors
    trained: Tensors
    losses: list[float]
    held_out_loss: float


def expected(
    config: RunConfig, noise: float, steps: int | None = None, stores_float32: bool = False
) -> Expected:
    """Return the oracle's run of `config`, or its first `steps`; computed once for all frameworks,
    partitions and schedules.

    `stores_float32`: after every step its weights are rounded to float32, as a float32 run has to.
    """
    # All that changes how a run is computed and not what, so that one oracle serves all of them.
    uncut = {"stages": 1, "chunks": 1, "partition": "even", "schedule": "gpipe"}
    plain = {"framework": "torch", "recompute": "none", "drift": None, "python": None}
    plain |= {"reduce": "overlap"}
    whole = {"tensor_parallel": 1, "vocab_parallel": False}
    neutral = config.model_copy(update=uncut | plain | whole)
    steps = config.train.steps if steps is None else steps
    return _expected(neutral.model_dump_json(), noise, steps, stores_float32)


@functools.lru_cache(maxsize=64)
def _expected(text: str, noise: float, steps: int, stores_float32: bool) -> Expected:
    config = RunConfig.model_validate_json(text)
    model, train, corpus = config.model, config.train, load_corpus(config)
    weights = starting_weights(Job(config=config, out="", noise=noise))
    # The optimizer alone: one step from a given gradient, so that no gradient's error is in it.
    probe = Oracle(model, train, weights)
    probe.gradients = {k: v.astype(np.float64) for k, v in optimizer_test_gradients(config).items()}
    probe.apply_gradients(0)
    oracle = Oracle(model, train, weights)
    first = corpus.training_batch(config, 0)
    unit_outputs = oracle.unit_outputs(first, config.replicas * train.micro_batches)
    oracle.forward_backward(first)
    gradients = dict(oracle.gradients)
    losses = []
    for step in range(steps):
        losses.append(oracle.train_step(corpus.training_batch(config, step)))
        if stores_float32:
            for weight in oracle.weights.values():
                weight[:] = weight.astype(np.float32)
    return Expected(
        dict(unit_outputs),
        _named(gradients, 0, "backward"),
        _named(probe.weights, 0, "optimizer"),
        _named(oracle.weights, steps, "trained"),
        losses,
        oracle.forward(held_out_batch(config, corpus), training=False)[0],
    )


def _named(arrays: dict[str, NDArray[Any]], step: int, phase: str) -> Tensors:
    return {
        TensorKey(step, phase, 0, -1, unit_of(name), name): value for name, value in arrays.items()
    }


def losses_as_tensors(losses: Sequence[float]) -> Tensors:
    return {
        TensorKey(step, "forward", 0, -1, "head", "loss"): np.array(loss)
        for step, loss in enumerate(losses)
    }


def compare_probe(run: Run, want: Expected, dtype: str) -> Comparison:
    """Return all checks of the parity tests, in order: the first failure is the first that differs.

    If the oracle did fewer steps, later losses and trained parameters are not compared.
    """
    steps = len(want.losses)
    curve, oracle_curve = losses_as_tensors(run.losses[:steps]), losses_as_tensors(want.losses)
    first, oracle_first = (
        {key: value for key, value in c.items() if key.step == 0} for c in (curve, oracle_curve)
    )
    # In the order of the computation: the first failure is the one nearest to its cause.
    checks = [
        compare(run.phase("forward"), want.unit_outputs, "activation", dtype),
        compare(first, oracle_first, "loss", dtype),
        compare(run.phase("backward"), want.gradients, "gradient", dtype),
        compare(run.phase("optimizer"), want.optimizer, "optimizer_step", dtype),
        compare(curve, oracle_curve, "loss_curve", dtype),
    ]
    if steps == len(run.losses):
        seen, right = (
            losses_as_tensors([value]) for value in (run.held_out_loss, want.held_out_loss)
        )
        checks.append(compare(seen, right, "loss_curve", dtype))
        checks.append(compare(run.phase("trained"), want.trained, "trained_parameter", dtype))
    return Comparison(tuple(difference for check in checks for difference in check.differences))
