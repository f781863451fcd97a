"""The oracle as a worker process: `python -m common.runtime.oracle_worker JOBS.json` leaves the
same files as a framework.

So the parent starts, watches, ends and reads it like any other run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.oracle.compression import ReplicatedOracle
from common.oracle.reference import Oracle, pieces_of, saved_bytes
from common.runtime.decode import Feed
from common.runtime.engine import Arrays
from common.runtime.executor import Event, unwatched
from common.runtime.job import JobFile
from common.runtime.memory import peak_resident_bytes
from common.runtime.parent import end_with_parent
from common.runtime.worker import run_jobs
from common.schedule.action import Action
from common.spec.data import Batch
from common.spec.parameters import TensorKey, parameter_shapes, unit_names
from common.spec.run import RunConfig


def memory_bytes(config: RunConfig) -> int:
    """Estimate the oracle's memory; for the preset `small` 0.92 GB, where 0.90 were measured."""
    model, sequences = config.model, config.train.batch_size
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    pieces = pieces_of(model, sequences)
    copies = 5 if pieces == 1 else 6  # a piece's gradients beside their sum
    return 8 * copies * parameters + saved_bytes(model, -(-sequences // pieces))


class OracleEngine:
    """`common.oracle.reference` behind the `Engine` protocol: without stages or schedules."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.devices = tuple(range(config.stages))
        self.on_action: Callable[[int, Action | None], None] = unwatched
        # Micro-batches of all replicas: it computes the whole mini-batch at once.
        self._pieces = config.replicas * config.train.micro_batches

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        config = self.config
        self.oracle = (
            Oracle(config.model, config.train, dict(weights))
            if config.compress == "none"
            else ReplicatedOracle(config, weights)
        )

    def forward_backward(self, batch: Batch) -> float:
        return self.oracle.forward_backward(batch)

    def apply_gradients(self, step: int) -> float:
        return self.oracle.apply_gradients(step)

    def evaluate(self, batch: Batch) -> float:
        return self.oracle.evaluate(batch)

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        return dict(self.oracle.unit_outputs(batch, self._pieces))

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        found: dict[TensorKey, NDArray[Any]] = {}
        for unit in unit_names(self.config.model):
            output, input_gradient, gradients = self.oracle.probe_unit(
                batch, unit, inputs.get(unit), output_gradients[unit]
            )
            key = TensorKey(batch.step, "unit_forward", 0, -1, unit, "output")
            for i, piece in enumerate(np.array_split(output, self._pieces)):
                found[key._replace(micro_batch=i)] = piece
            key = key._replace(phase="unit_backward", tensor="input_gradient")
            if input_gradient is not None:  # the embedding's input is tokens
                for i, piece in enumerate(np.array_split(input_gradient, self._pieces)):
                    found[key._replace(micro_batch=i)] = piece
            found |= {key._replace(tensor=name): gradient for name, gradient in gradients.items()}
        return found

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        nothing = Batch(0, inputs, np.zeros_like(inputs))
        return self.oracle.forward(nothing, training=False)[1]["head"]

    def decode(self, feed: Feed) -> None:
        """As the protocol says, one group after another, with no cache: the reference for those."""
        # The whole text again for every token: slow, without a cache that could be wrong.
        for group in range(self.config.train.micro_batches):
            texts, logits = np.zeros((0, 0), np.int64), None
            while (extension := feed(group, logits)) is not None:
                texts = (
                    extension.tokens
                    if extension.rows is None
                    else np.concatenate([texts[list(extension.rows)], extension.tokens], 1)
                )  # (b, s)
                logits = self.predict(texts)[:, -1]

    def optimizer_state(self) -> Arrays:
        return {
            f"{moment}/{name}": value.copy()
            for moment in checkpoint.moments_of(self.config.train)
            for name, value in getattr(self.oracle, moment).items()
        }

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        for key, value in state.items():
            moment, name = key.split("/")
            getattr(self.oracle, moment)[name][:] = value

    def weights(self) -> Arrays:
        return {name: value.copy() for name, value in self.oracle.weights.items()}

    def gradients(self) -> Arrays:
        return dict(self.oracle.gradients)

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        self.oracle.gradients = {k: np.asarray(v, np.float64) for k, v in gradients.items()}

    def events(self) -> dict[int, list[Event]]:
        return {device: [] for device in self.devices}

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def environment(self) -> dict[str, Any]:
        version = f"numpy {np.__version__}"
        return {"framework": "oracle", "version": version, "device": "cpu", "dtype": "float64"}

    def peak_memory_bytes(self) -> dict[int, int]:
        return {0: peak_resident_bytes()}

    def held_bytes_peak(self) -> dict[int, int]:
        return {}

    def in_flight_peak(self) -> dict[int, int]:
        return {}

    def close(self) -> None: ...


def main(arguments: list[str], engine: Callable[[RunConfig], OracleEngine] = OracleEngine) -> int:
    """Run the jobs, as the implementations' workers do (`python -m torch_impl JOBS.json`)."""
    end_with_parent()
    try:
        jobs = JobFile.read(arguments[0])
    except ValueError as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 2
    return run_jobs(jobs, engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
