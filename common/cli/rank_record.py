"""The result file of a run over hosts, which rank 0 writes.

On one machine the parent lives on when a worker dies, and says so in the result. Here there is no
parent: so the result is a failed one from the start, and replaced when more is known.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from common.cli import train
from common.harness.restarts import Trained, Training, joined
from common.report.result import RunResult
from common.runtime.job import Part, StepRecord
from common.runtime.outcome import Outcome

UNKNOWN = "not over, or the process of rank 0 was ended before it could say how"


@dataclass
class Record:
    """What is known of this run. Ranks but the first write the log only."""

    training: Training
    command: str
    console: Console
    is_first: bool
    log: Path
    """Where a traceback goes, or where every thread of this process stood."""
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_over: bool = False

    def begin(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.is_first:
            self._write(Trained(Outcome("failed", UNKNOWN, None, (), 0.0)))

    def ok(self, parts: Sequence[Part], steps: list[StepRecord]) -> None:
        outcome = Outcome("ok", "", None, tuple(parts), time.monotonic() - self.began)
        with self._lock:
            self._end(Trained(outcome, steps))

    def failed(
        self, reason: str, traceback: str | None = None, is_interrupted: bool = False
    ) -> None:
        """Note why. Without a traceback the log says where every thread stands now."""
        # The main thread, the heartbeat's and a signal's may each find an end: the first counts.
        with self._lock:
            if self._is_over:
                return
            with self.log.open("w", encoding="utf-8") as log:
                print(traceback or reason, file=log, flush=True)
                if traceback is None:
                    faulthandler.dump_traceback(log)
            steps = joined([], self.training.folder / "progress.jsonl")
            outcome = Outcome("failed", reason, self.log, (), time.monotonic() - self.began)
            self._end(Trained(outcome, steps, interrupted=is_interrupted))

    def _end(self, trained: Trained) -> None:
        self._is_over = True
        if self.is_first:
            train.show(self._write(trained), trained, self.training, self.console)

    def _write(self, trained: Trained) -> RunResult:
        result = train.result_of(trained, self.training, self.command)
        result.write(self.training.folder / "result.json")
        return result
