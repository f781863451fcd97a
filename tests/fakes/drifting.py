"""`python -m tests.fakes.drifting JOBS.json`: the oracle in place of a framework, with some of the
drift zoo's habits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.oracle.reference import Oracle
from common.runtime.job import JobFile
from common.runtime.oracle_worker import OracleEngine
from common.runtime.worker import run_jobs
from common.spec.data import Batch


class DriftingEngine(OracleEngine):
    """Two habits as they should be, one in the wrong place, and one that fails; the others do
    nothing.
    """

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        model, train, drift = self.config.model, self.config.train, self.config.drift
        if drift == "layer-norm-epsilon":
            model = model.model_copy(update={"norm_epsilon": 1e-3})
        if drift == "default-betas":
            train = train.model_copy(update={"beta2": float(np.float32(0.999))})
        if drift == "tanh-gelu":
            raise ValueError("this framework has no tanh")
        self.oracle = Oracle(model, train, dict(weights))

    def forward_backward(self, batch: Batch) -> float:
        loss = super().forward_backward(batch)
        if self.config.drift == "unscaled-micro-batches":
            self.oracle.gradients["head.norm.bias"] *= 4
        return loss


if __name__ == "__main__":
    sys.exit(run_jobs(JobFile.read(sys.argv[1]), DriftingEngine))
