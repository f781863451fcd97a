"""The threads of a model's stages, and a walk through a schedule on all of them.

Differs: PyTorch's engine has its threads itself, Paddle's stages are processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import keras

from common.runtime.executor import Event, run_stage
from common.schedule.action import Action, Schedule
from tf_impl import executors
from tf_impl.clock import StreamClock
from tf_impl.stage import Channel, Stage

Result = TypeVar("Result")


class StageThreads(keras.Model):
    """The part of a `GPipeModel` that runs work on its stages."""

    stages: list[Stage]
    held: tuple[int, ...]
    """The devices whose stages this process computes."""
    stage_devices: list[str]
    times_actions: bool
    on_action: Callable[[int, Action | None], None]
    _threads: list[ThreadPoolExecutor]

    def on_stage(self, d: int, work: Callable[[], Result]) -> Result:
        """Run `work` on a stage's thread; `fit` calls `train_step` within Keras' own strategy."""
        return self._submit(d, work).result()

    def on_all_stages(self, work: Callable[[int], Result]) -> list[Result]:
        """Run `work(device)` on the threads of all held stages at once."""
        futures = [self._submit(d, functools.partial(work, d)) for d in self.held]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the stages' threads; the model can no longer train."""
        for thread in self._threads:
            thread.shutdown()

    def _run(self, schedule: Schedule, begin: Callable[[int], Any]) -> dict[int, list[Event]]:
        """Walks `schedule` on all stages, after `begin(device)`; raises the first failure."""

        def walk(d: int, channel: Channel, before: Callable[[Action], None]) -> list[Event]:
            # `begin` is a step's Stage or a prediction's ForwardOnly: the walk is the same.
            return run_stage(schedule, d, begin(d), channel, before, self._clock(d))

        events = dict(zip(self.held, self.walk_all(walk), strict=True))
        return events if self.times_actions else {}

    def walk_all(
        self, walk: Callable[[int, Channel, Callable[[Action], None]], Result]
    ) -> list[Result]:
        """Run `walk(device, channel, before)` on all stages at once; raise the first failure."""
        channel = self._open_channel()
        results: dict[int, Result] = {}

        def guarded(d: int) -> None:
            # [1] of the executor: a stage whose neighbour has failed would wait for ever.
            def before(action: Action) -> None:
                channel.check()
                self._ahead()
                self.on_action(d, action)

            try:
                results[d] = walk(d, channel, before)
                self._behind()
                self.on_action(d, None)  # done: whoever watches waits for no further action
            except Exception as error:
                channel.stop(error)

        self.on_all_stages(guarded)
        if channel.failure is not None:
            raise channel.failure
        return [results[d] for d in self.held]

    def _open_channel(self) -> Channel:
        """What carries the tensors of one pass."""
        return Channel()

    def _ahead(self) -> None:
        """What else happens ahead of every action."""

    def _behind(self) -> None:
        """And behind the last."""

    def _submit(self, d: int, work: Callable[[], Result]) -> Future[Result]:
        def on_device() -> Result:
            # A device and an executor are a thread's own, and TensorFlow forgets them on leaving.
            with self._executor(d):
                return work()

        return self._threads[d].submit(on_device)

    def _clock(self, d: int) -> StreamClock | None:
        device = self.stage_devices[d]
        return StreamClock(device) if self.times_actions and "GPU" in device else None

    def _executor(self, d: int) -> contextlib.AbstractContextManager[Any]:
        """The device of a stage, and what runs its functions."""
        only_own_device = all(chunk.only_own_device for chunk in self.stages[d].chunks)
        return executors.stage_thread(self.stage_devices[d], only_own_device)
