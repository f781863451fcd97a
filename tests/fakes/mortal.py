"""`python -m tests.fakes.mortal JOBS.json`: the oracle, which dies on request, once at each place.

The variable FAKE_DEATHS, such as `kill@3,raise@5`, says how and in which step; FAKE_MARK names a
folder that remembers which of them have happened.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from common.runtime.job import JobFile
from common.runtime.worker import run_jobs
from common.spec.data import Batch
from tests.fakes.impl import FakeEngine


class MortalEngine(FakeEngine):
    """The oracle, unless it is time to die."""

    def forward_backward(self, batch: Batch) -> float:
        match self._death(batch.step):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise ValueError("gave up")
            case "hang":
                signal.pause()
            case "nan-moment":  # as an engine without clipping, which does not look at its norm
                loss = super().forward_backward(batch)
                self.oracle.second_moment["block.0.norm_2.bias"][0] = np.nan
                return loss
            case "wrong":
                return super().forward_backward(batch) * (1 + 1e-9)
            case "nan-weight":
                self.oracle.weights["block.0.feed_forward.up.bias"][0] = np.nan
            case "nan-activation":  # finite weights, infinite product
                self.oracle.weights["block.1.feed_forward.up.bias"][:] = 10
                self.oracle.weights["block.1.feed_forward.down.weight"][:] = 1e308
            case "nan-gradient":
                loss = super().forward_backward(batch)
                self.oracle.gradients["block.1.norm_2.bias"][0] = np.nan
                self.oracle.gradients["block.0.norm_2.bias"][0] = np.nan
                return loss
        return super().forward_backward(batch)

    def _death(self, step: int) -> str:
        for death in os.environ.get("FAKE_DEATHS", "").split(","):
            kind, _, place = death.partition("@")
            mark = Path(os.environ["FAKE_MARK"]) / death
            if place == str(step) and not mark.exists():
                mark.touch()
                return kind
        return ""


if __name__ == "__main__":
    sys.exit(run_jobs(JobFile.read(sys.argv[1]), MortalEngine))
