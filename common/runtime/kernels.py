"""How fast a framework runs the kernels of a run, on one thread or a GPU: a limit for any pipeline.

Each framework has a worker process (`python -m torch_impl.roofline CONFIG`) that answers each line
it reads with one round: the seconds of every kernel. `common.harness.kernel_times` makes them take
turns. This module by itself measures the machine, with NumPy.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.runtime.parent import end_with_parent
from common.spec.run import ELEMENT_BYTES, RunConfig

COPIES = 8
"""Inputs that one call works through, so that the cost of a call itself counts little."""


ROUND_SECONDS = 0.02
"""The least time for which a round measures each kernel."""


Operations = Mapping[str, Callable[[], object]]
"""By the names of `kernels`: a call that has done its work `COPIES` times when it returns."""


@dataclass(frozen=True)
class Kernel:
    """One row: what is computed once, and how much work that is."""

    name: str
    work: float
    """Floating-point operations, or bytes that must at least be read and written."""
    unit: Literal["GFLOP/s", "GB/s"]
    calls: int
    """In the forward and backward of one micro-batch."""


def kernels(config: RunConfig) -> list[Kernel]:
    """Return the kernels of one micro-batch.

    A product (n, a) x (a, b) has 2 n a b operations, and so has each of its gradients.
    """
    model, train = config.model, config.train
    sequences, layers = config.micro_batch_sizes[0], model.num_layers
    n, d, f = sequences * model.context_length, model.d_model, model.d_ff
    products = {
        "query, key, value, output": (2 * n * d * d, 4 * layers),
        "feed-forward up": (2 * n * d * f, layers),
        "feed-forward down": (2 * n * f * d, layers),
        "head": (2 * n * d * model.vocab_size, 1),
    }
    found = [
        Kernel(name + part, work, "GFLOP/s", calls)
        for name, (work, calls) in products.items()
        for part in ("", ", input gradient", ", weight gradient")
    ]
    # Scores and mix: for each of n positions S x E multiply-adds in H heads, H E = D. Three times:
    # the forward, and in the backward one for each of the two factors.
    attention = 2 * n * model.context_length * d
    found += [
        Kernel(f"attention {name}", attention, "GFLOP/s", 3 * layers) for name in ("scores", "mix")
    ]
    passes = {  # with the gradient, each reads x and dy and writes y and dx
        "softmax and gradient": ((sequences * model.num_heads * model.context_length**2), layers),
        f"{model.activation} and gradient": (n * f, layers),
        "layer norm and gradient": (n * d, 2 * layers + 1),
        "loss and gradient": (n * model.vocab_size, 1),
    }
    size = ELEMENT_BYTES[train.dtype]
    return found + [
        Kernel(name, 4 * count * size, "GB/s", calls) for name, (count, calls) in passes.items()
    ]


PEAKS = (
    Kernel("product of 1,024 x 1,024", 2 * 1024**3, "GFLOP/s", 0),
    Kernel("copy of 64 MiB", 2**27, "GB/s", 0),
)
"""What the machine itself is measured by."""


def answer(
    arguments: Sequence[str], prepare: Callable[[RunConfig], tuple[Operations, Mapping[str, Any]]]
) -> int:
    """Run the worker: prepare, print the environment, then measure one round for each line read."""
    end_with_parent()
    try:
        operations, environment = prepare(RunConfig.model_validate_json(arguments[0]))
    except (ImportError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 0
    for operation in operations.values():
        operation()  # traces, and fills caches
    print(json.dumps({"environment": environment}, default=str), flush=True)
    # A GPU computes while its process sleeps.
    on_gpu = environment.get("device_kind", "cpu") != "cpu"
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in sys.stdin:
        print(
            json.dumps({name: seconds_of(each, clock) for name, each in operations.items()}),
            flush=True,
        )
    return 0


def seconds_of(operation: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the time of one of the `COPIES`, the median over three calls at least.

    Where a CPU computes it is CPU time, which other processes disturb less than elapsed time.
    """
    taken: list[float] = []
    # Three at least, for a median; more where a call is so short that the clock's steps would show.
    begun = clock()
    while len(taken) < 3 or clock() - begun < ROUND_SECONDS:
        start = clock()
        operation()
        taken.append(clock() - start)
    return statistics.median(taken) / COPIES


def _machine(config: RunConfig) -> tuple[Operations, Mapping[str, Any]]:
    import numpy as np

    a = np.ones((1024, 1024), "float64" if config.train.dtype == "float64" else "float32")
    source, target = np.ones(2**23), np.ones(2**23)

    def product() -> None:
        for _ in range(COPIES):
            a @ a

    def copy() -> None:
        for _ in range(COPIES):
            np.copyto(target, source)

    return {PEAKS[0].name: product, PEAKS[1].name: copy}, {
        "framework": "NumPy",
        "version": np.__version__,
    }


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], _machine))
