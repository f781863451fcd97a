"""The oracle as bfloat16 has it at best: forward and backward see weights rounded to bfloat16.

`python -m common.runtime.rounded_oracle JOBS.json`. Arithmetic, gradients and the weights that the
optimizer changes stay in float64. So what sets it apart from the oracle is what `--dtype bfloat16`
means, whatever the framework.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from common.runtime.oracle_worker import OracleEngine, main
from common.spec.data import Batch
from common.spec.rounding import in_precision


class RoundedOracleEngine(OracleEngine):
    """`OracleEngine` that computes losses and gradients at the rounded weights."""

    def forward_backward(self, batch: Batch) -> float:
        with self._rounded():
            return super().forward_backward(batch)

    def evaluate(self, batch: Batch) -> float:
        with self._rounded():
            return super().evaluate(batch)

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"weights": "rounded to bfloat16"}

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        masters = self.oracle.weights
        self.oracle.weights = {
            name: in_precision(w, "bfloat16").astype(np.float64) for name, w in masters.items()
        }
        try:
            yield
        finally:
            self.oracle.weights = masters


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], RoundedOracleEngine))
