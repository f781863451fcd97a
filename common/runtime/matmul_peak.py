"""Measure how fast a machine multiplies large matrices: the most that any training could use.

`python -m common.runtime.matmul_peak DTYPE THREADS` does it with NumPy. Cards and bfloat16 need a
framework: `torch_impl.matmul_peak`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from common.runtime.parent import end_with_parent

SIDE = 1536
"""On a CPU: 7 GFLOP a product, large enough for the rate not to depend on it."""
LEAST_SECONDS, LEAST_RUNS = 0.2, 3


def best_rate(product: Callable[[], object], side: int) -> float:
    """Return the FLOP/s of the fastest of several products of two square matrices."""
    product()  # allocates, and starts threads
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS:
        start = time.perf_counter()
        product()
        taken.append(time.perf_counter() - start)
    return 2 * side**3 / min(taken)


def main(arguments: Sequence[str]) -> int:
    end_with_parent()
    dtype, threads = arguments
    for library in ("OPENBLAS", "MKL", "OMP", "VECLIB_MAXIMUM"):
        os.environ[f"{library}_NUM_THREADS"] = threads  # read when NumPy is imported
    import numpy as np

    a, out = np.ones((SIDE, SIDE), dtype), np.empty((SIDE, SIDE), dtype)
    rate = best_rate(lambda: np.matmul(a, a, out), SIDE)
    print(json.dumps({"flops_per_second": rate, "by": f"NumPy {np.__version__}"}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
