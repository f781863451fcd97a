"""The threads of a model's stages, and a walk through a schedule on all of them.

Differs: PyTorch's engine has its threads itself, Paddle's stages are processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import keras

from common.runtime.executor import Event, run_stage
from common.schedule.action import Action, Schedule
from tf_impl import executors
from tf_impl.stage import Channel

Result = TypeVar("Result")


class StageThreads(keras.Model):
    """The part of a `GPipeModel` that runs work on its stages."""

    def on_stage(self, d: int, work: Callable[[], Result]) -> Result:
        """Run `work` on a stage's thread, where its device and its strategy may be entered.

        Not so on the caller's: `fit` calls `train_step` within Keras' own strategy.
        """
        return self._submit(d, work).result()

    def on_all_stages(self, work: Callable[[int], Result]) -> list[Result]:
        """Run `work(device)` on the threads of all stages at once."""
        futures = [self._submit(d, functools.partial(work, d)) for d in range(len(self.stages))]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the stages' threads; the model can no longer train."""
        for thread in self._threads:
            thread.shutdown()

    def _run(self, schedule: Schedule, begin: Callable[[int], Any]) -> dict[int, list[Event]]:
        """Walks `schedule` on all stages, `begin(device)` first. Returns the events; raises the
        first stage's failure.
        """
        channel = Channel()

        def walk(d: int) -> list[Event]:
            def before(action: Action) -> None:
                channel.check()
                self.on_action(d, action)

            try:
                events = run_stage(schedule, d, begin(d), channel, before)
                self.on_action(d, None)
                return events
            except Exception as error:
                channel.stop(error)
                return []

        events = dict(enumerate(self.on_all_stages(walk)))
        if channel.failure is not None:
            raise channel.failure
        return events

    def _submit(self, d: int, work: Callable[[], Result]) -> Future[Result]:
        def on_device() -> Result:
            with self._executor(d):
                return work()

        return self._threads[d].submit(on_device)

    def _executor(self, d: int) -> contextlib.AbstractContextManager[Any]:
        """The device of a stage, and what runs its functions."""
        only_own_device = all(chunk.only_own_device for chunk in self.stages[d].chunks)
        return executors.stage_thread(self.stage_devices[d], only_own_device)
