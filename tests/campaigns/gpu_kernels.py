"""`python -m tests.campaigns.gpu_kernels`: which operations of the TensorFlow engine's graphs have
no GPU kernel. They run on the CPU (docs/gpu.md).

Asks the registry of kernels, so it needs TensorFlow's CUDA build and no GPU. `pip install --no-deps
--target FOLDER tensorflow==2.21.*` and PYTHONPATH=FOLDER put that before the CPU build.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from tests.engines import batch, small
from tf_impl import devices, gpus

RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
    "dropout": {"dropout": 0.1},
    "native dropout": {"dropout": 0.1, "dropout_masks": "native"},
    "tied head, SGD": {"tied_head": True, "train": {"optimizer": "sgd", "momentum": 0.9}},
    "post-norm, ReLU, zb-h1": {"norm": "post", "activation": "relu", "schedule": "zb-h1"},
    "tanh GELU, recomputation": {"activation": "gelu_tanh", "run": {"recompute": "full"}},
}
"""Options of `tests.engines.small`: every kind of layer, loss and optimizer that there is."""


def graphs(engine: Any) -> Iterator[Any]:
    """Yield those of everything that a step, an evaluation and a prediction call."""
    made: list[Any] = []
    for chunk in engine.model.chunks:
        for functions in chunk.functions:
            made += functions.made().values()
        made += [chunk.evaluate, chunk._clear, chunk._cast]
    for optimizer in engine.model._optimizers:
        made += [optimizer._squares, optimizer._update]
    for function in made:
        concrete = getattr(function, "function", function)  # of an `OnCallingThread`
        if hasattr(concrete, "graph"):
            yield concrete.graph
        else:
            yield from (traced.graph for traced in concrete._list_all_concrete_functions())


def main() -> int:
    """Print a line a run. Returns the exit status: 2 without TensorFlow's CUDA build."""
    devices.configure(2, 2, "cpu")
    from tf_impl.engine import build_engine

    said = devices.environment(devices.stage_devices(2, "cpu"))
    print(f"TensorFlow {said['version']}")
    for name, options in RUNS.items():
        engine = build_engine(small("tensorflow", 2, **options))
        given = batch(engine)
        engine.forward_backward(given)
        engine.apply_gradients(0)
        engine.evaluate(given)
        found = list(graphs(engine))
        engine.close()
        missing = gpus.without_kernel(found)
        if any(operation.startswith("MatMul") for operation in missing):
            print("this TensorFlow has no GPU kernels; expected its CUDA build", file=sys.stderr)
            return 2
        print(f"{name}: {', '.join(missing) or 'none'} ({len(found)} graphs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
