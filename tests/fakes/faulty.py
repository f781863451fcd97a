"""`python -m tests.fakes.faulty JOBS.json`: the oracle, which tells of its actions, so that
`Job.fault` strikes it.
"""

from __future__ import annotations

import sys

from common.runtime.job import JobFile
from common.runtime.parent import end_with_parent
from common.runtime.worker import run_jobs
from common.spec.data import Batch
from tests.fakes.impl import FakeEngine


class FaultyEngine(FakeEngine):
    """The oracle; one device after another says what it would do."""

    def forward_backward(self, batch: Batch) -> float:
        for device, events in self.events().items():
            for event in events:
                self.on_action(device, event.action)
            self.on_action(device, None)
        return super().forward_backward(batch)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(run_jobs(JobFile.read(sys.argv[1]), FaultyEngine))
