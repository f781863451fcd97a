"""The engine: one thread per device, each walking its own line of the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.oracle.reference import clip_scale, global_norm
from common.runtime.cpus import threads_per_stage
from common.runtime.decode import Extension, Feed, run_decoding
from common.runtime.engine import Arrays, Engine
from common.runtime.executor import Event, run_stage, unwatched
from common.runtime.memory import peak_resident_bytes
from common.runtime.mode import Mode
from common.schedule.action import Action, Schedule
from common.schedule.generators import make_schedule
from common.spec.data import Batch
from common.spec.parameters import TOKEN_EMBEDDING, TensorKey, parameter_shapes, unit_names
from common.spec.partition import plan_partition
from common.spec.run import RunConfig
from torch_impl import devices, graphs, streams, workspaces
from torch_impl.clock import StreamClock
from torch_impl.gradients import gradient_of
from torch_impl.graphs import GraphedStage
from torch_impl.optimizer import StageOptimizer
from torch_impl.probe import probe_units
from torch_impl.shards import WHOLE, Shards
from torch_impl.stage import Channel, Stage
from torch_impl.streams import PairedStreams
from torch_impl.weights import (
    export_gradients,
    export_weights,
    load_gradients,
    load_weights,
    to_array,
)

_Result = TypeVar("_Result")

_POLL_SECONDS = 0.5
"""How often a pass on GPUs is asked where they are, for `Engine.on_action`."""


def build_engine(config: RunConfig) -> Engine:
    """Return the engine of `config`. Raises ScheduleError or ValueError for a run that cannot be."""  # noqa: E501
    if config.executor != "table":
        from torch_impl.baseline import build_baseline  # imports much that a table does not need

        return build_baseline(config)
    return PipelineEngine(config)


class PipelineEngine:
    """The stages of this process, each with a thread of its own (`common.runtime.engine.Engine`):
    all of them, unless a subclass (`torch_impl.rank_engine`) holds one.

    PyTorch's operators release Python's lock, so the threads compute at the same time.
    """

    replica = 0
    shards = WHOLE

    def __init__(self, config: RunConfig) -> None:
        self._build(
            config,
            tuple(range(config.stages)),
            devices.stage_devices(config.stages, config.device),
            threads_per_stage(config.stages, config.threads),
        )

    def _build(
        self,
        config: RunConfig,
        own: tuple[int, ...],
        torch_devices: list[torch.device],
        threads: int,
    ) -> None:
        """Make the stages that this process holds; `torch_devices` are those of all stages."""
        self.config = config
        self.schedule = make_schedule(
            config.schedule, config.stages, config.train.micro_batches, config.chunks
        )
        self.devices = own
        self.on_action: Callable[[int, Action | None], None] = unwatched
        self._torch_devices = torch_devices
        self._copy_streams = streams.copy_streams(torch_devices)
        parts = plan_partition(config).parts
        # One thread for each stage, for good: PyTorch's number of threads and current stream belong
        # to the thread that has set them.
        self._threads = {
            d: ThreadPoolExecutor(
                1, f"stage-{d}", streams.prepare_thread, (torch_devices[d], threads)
            )
            for d in own
        }
        made = self._on_all(
            lambda d: Stage(
                config,
                [parts[k] for k in self.schedule.parts[d]],
                torch_devices[d],
                self.replica,
                self._shards_of(d),
            )
        )
        self.stages = dict(zip(own, made, strict=True))
        # Empty where nothing is recorded; else `walk` takes these in the stages' place.
        self._graphed = (
            {d: GraphedStage(stage) for d, stage in self.stages.items()}
            if graphs.why_eager(config, torch_devices[own[0]]) is None
            else {}
        )
        self._pairs = dict(zip(own, self._on_all(self._paired_streams), strict=True))
        self._named = [item for stage in made for item in stage.named]
        self._events: dict[int, list[Event]] = {}
        self._earlier_peaks: dict[torch.device, int] = {}
        self._reset_optimizers()

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._on_all(lambda d: load_weights(self.stages[d].named, weights))
        self._reset_optimizers()
        self._reset_peaks({})

    def forward_backward(self, batch: Batch) -> float:
        loss = self._run(self.schedule, batch, Mode.TRAIN)
        if self.config.model.tied_head:
            self._add_tied_gradients()
        return loss

    def apply_gradients(self, step: int) -> float:
        """As the protocol says. The gradients are clipped in place: read them before."""
        squares = self._on_all(lambda d: self._optimizers[d].squared_norms(self._counts))
        # Added on the host in the order of the model, whatever the partition.
        own = [square for stage in squares for square in stage]
        norm = global_norm(self._everybodys(own))
        scale = clip_scale(norm, self.config.train.clip_norm)
        self._on_all(lambda d: self._optimizers[d].step(step, scale))
        return norm

    def evaluate(self, batch: Batch) -> float:
        return self._run(self.schedule.only_forward(), batch, Mode.EVALUATE)

    def unit_outputs(self, batch: Batch) -> dict[TensorKey, NDArray[Any]]:
        self._run(self.schedule.only_forward(), batch, Mode.RECORD)
        where = {
            key: (d, tensor)
            for d, stage in self.stages.items()
            for key, tensor in stage.outputs.items()
        }
        outputs, m = {}, self.config.train.micro_batches
        for unit in unit_names(self.config.model):
            for i in range(m):
                if (unit, i) in where:
                    device, tensor = where[unit, i]
                    number = self.replica * m + i
                    key = TensorKey(batch.step, "forward", device, number, unit, "output")
                    outputs[key] = to_array(tensor)
        self._drop_outputs()
        return outputs

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        found = self._on_all(
            lambda d: probe_units(self.stages[d], d, batch, inputs, output_gradients)
        )
        return {key: array for arrays in found for key, array in arrays.items()}

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self._run(
            self.schedule.only_forward(), Batch(0, inputs, np.zeros_like(inputs)), Mode.PREDICT
        )
        logits = {
            i: tensor for stage in self.stages.values() for (_, i), tensor in stage.outputs.items()
        }
        self._drop_outputs()
        return np.concatenate([to_array(logits[i]) for i in range(len(logits))])

    def decode(self, feed: Feed) -> None:
        forwards = self.schedule.only_forward()

        def fed(group: int, logits: Tensor | None) -> Extension | None:
            return feed(group, None if logits is None else to_array(logits))

        def walk(d: int, channel: Channel) -> None:
            def before(action: Action) -> None:
                channel.check()  # as in `_run`
                self.on_action(d, action)

            self.stages[d].begin_decoding()
            run_decoding(forwards, d, self.stages[d], channel, fed, before)
            self.on_action(d, None)

        self._walk_all(self._open_channel(forwards, Mode.PREDICT), walk)

    def optimizer_state(self) -> Arrays:
        found = self._on_all(lambda d: self._optimizers[d].state())
        merged = {key: array for arrays in found for key, array in arrays.items()}
        moments = sorted({key.partition("/")[0] for key in merged})
        return {
            key: merged[key]
            for m in moments
            for name in parameter_shapes(self.config.model)
            if (key := f"{m}/{name}") in merged
        }

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        self._on_all(lambda d: self._optimizers[d].load_state(state, steps_done))

    def weights(self) -> Arrays:
        return self._in_order(self._on_all(lambda d: export_weights(self.stages[d].named)))

    def gradients(self) -> Arrays:
        """As the protocol says, until `apply_gradients` clips them in place."""
        return self._in_order(self._on_all(lambda d: export_gradients(self.stages[d].named)))

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        self._on_all(lambda d: load_gradients(self.stages[d].named, gradients))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def events(self) -> dict[int, list[Event]]:
        return self._events

    def environment(self) -> dict[str, Any]:
        said = self._on(self.devices[0], lambda: devices.environment(self._torch_devices))
        return (
            said
            | devices.best_track(self.config)
            | graphs.environment(self.config, self._torch_devices[0])
        )

    def peak_memory_bytes(self) -> dict[int, int]:
        """As the protocol says; stages that share a GPU are counted together, under the first of
        them.
        """
        peaks = {
            self._torch_devices.index(device): max(
                self._earlier_peaks.get(device, 0),
                torch.cuda.max_memory_allocated(device)
                + graphs.idle_bytes(self._graphed.values(), device),
            )
            for device in self._cuda_devices()
        }
        return peaks or {0: peak_resident_bytes()}

    def held_bytes_peak(self) -> dict[int, int]:
        return {d: stage.held.peak_bytes for d, stage in self.stages.items()}

    def in_flight_peak(self) -> dict[int, int]:
        return {d: stage.held.peak_in_flight for d, stage in self.stages.items()}

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()
        self._drop_recordings()
        workspaces.free_workspaces(self._torch_devices)

    def _run(self, schedule: Schedule, batch: Batch, mode: Mode) -> float:
        """Every stage walks its line of the schedule. Returns the mean loss; raises the first
        stage's failure.
        """
        clocks: list[StreamClock] = []

        def walk(d: int, channel: Channel) -> tuple[list[Event], list[float]]:
            # On a GPU the clock notes the action that the host queues, and later, from
            # `note_again`, the one that the GPU has reached.
            note: Callable[[Action], None] = partial(self.on_action, d)
            clock = None
            pairs = self._pairs[d] if mode is Mode.TRAIN else None

            def before(action: Action) -> None:
                channel.check()  # another stage may have failed: stop between two actions
                if pairs is not None:
                    pairs.enter(action)
                self._ahead()
                note(action)

            stage = self.stages[d]
            walker = self._graphed[d] if self._graphed else stage
            try:
                walker.begin(batch, mode)
                if stage.device.type == "cuda":
                    clock = StreamClock(note)
                    clocks.append(clock)
                    note = clock.begin
                events = run_stage(schedule, d, walker, channel, before, clock)
            finally:
                if pairs is not None:
                    pairs.leave()
            self._behind()
            self.on_action(d, None)
            return events, stage.losses()

        def note_again() -> None:
            for clock in tuple(clocks):
                clock.note_again()

        try:
            results = self._walk_all(self._open_channel(schedule, mode), walk, note_again)
        except Exception:
            self._drop_recordings()  # some may be half a step
            raise
        if any(stage.records for stage in self._graphed.values()):
            self._reset_peaks(
                {device: torch.cuda.max_memory_allocated(device) for device in self._cuda_devices()}
            )
        if mode is Mode.TRAIN:
            self._events = {d: events for d, (events, _) in zip(self.devices, results, strict=True)}
        # fsum is exact, so that the order of the micro-batches changes nothing.
        own = [loss for _, losses in results for loss in losses]
        return math.fsum(self._everybodys(own))

    def _shards_of(self, device: int) -> Shards:
        """What the layers of a stage know of its other shards."""
        return self.shards

    def _open_channel(self, schedule: Schedule, mode: Mode) -> Channel:
        """What carries the tensors of one pass."""
        return Channel(self._torch_devices, self._copy_streams)

    def _paired_streams(self, device: int) -> PairedStreams | None:
        """None where one stream is enough."""
        stage, actions = self.stages[device], self.schedule.devices[device]
        if stage.device.type != "cuda" or not any(action.overlaps for action in actions):
            return None
        direct = [parameter for chunk in stage.chunks for parameter in chunk.direct]
        return PairedStreams(stage.device, actions, direct)

    def _ahead(self) -> None:
        """What else happens ahead of every action."""

    def _behind(self) -> None:
        """And behind the last."""

    def _counts(self, name: str) -> bool:
        """Whether a parameter's gradient is here one of those that the norm is of."""
        return True

    def _everybodys(self, values: list[float]) -> list[float]:
        """The values of all processes, in any order: losses of micro-batches, or squared norms."""
        return values

    def _walk_all(
        self,
        channel: Channel,
        walk: Callable[[int, Channel], _Result],
        while_waiting: Callable[[], None] = lambda: None,
    ) -> list[_Result]:
        """Runs `walk(device, channel)` on all stages at once. Raises the first stage's failure."""
        results: dict[int, _Result] = {}

        def guarded(d: int) -> None:
            try:
                results[d] = walk(d, channel)
            except Exception as error:
                channel.stop(error)  # wakes the stages that wait for a message of this one

        walks = [self._submit(d, partial(guarded, d)) for d in self.devices]
        # The host of a GPU has queued everything long before it is done, and then waits.
        while wait(walks, _POLL_SECONDS).not_done:
            while_waiting()
        if channel.failure is not None:
            raise channel.failure
        for one in walks:
            one.result()
        return [results[d] for d in self.devices]

    def _add_tied_gradients(self) -> None:
        """The token embedding's gradient: that of its own use plus that of the head's copy, put in
        both.
        """
        own, copy = (
            next(
                (d, gradient_of(item.parameter))
                for d, stage in self.stages.items()
                for item in stage.named
                if item.name == TOKEN_EMBEDDING and item.is_copy == is_copy
            )
            for is_copy in (False, True)
        )
        # In the thread of the stage that holds each: its stream has to wait for its gradient.
        self._on(own[0], lambda: own[1].add_(copy[1].to(own[1].device)))
        self._on(copy[0], lambda: copy[1].copy_(own[1]))

    def _reset_optimizers(self) -> None:
        def reset(d: int) -> StageOptimizer:
            stage = self.stages[d]
            for item in stage.named:
                gradient_of(item.parameter).zero_()
            return StageOptimizer(self.config.train, stage.named)

        self._optimizers = dict(zip(self.devices, self._on_all(reset), strict=True))

    def _drop_recordings(self) -> None:
        for stage in self._graphed.values():
            stage.drop()

    def _reset_peaks(self, earlier: dict[torch.device, int]) -> None:
        """From now on what recordings hold counts all the time, and not only while it is allocated,
        as in `earlier`.
        """
        self._earlier_peaks = earlier
        for device in self._cuda_devices():
            torch.cuda.reset_peak_memory_stats(device)

    def _drop_outputs(self) -> None:
        for stage in self.stages.values():
            stage.outputs = {}

    def _submit(self, device: int, work: Callable[[], _Result]) -> Future[_Result]:
        """Starts `work` in the thread of a device; it ends when the GPU has ended too."""

        def run() -> _Result:
            result = work()
            if self._torch_devices[device].type == "cuda":
                torch.cuda.current_stream().synchronize()
            return result

        return self._threads[device].submit(run)

    def _on(self, device: int, work: Callable[[], _Result]) -> _Result:
        return self._submit(device, work).result()

    def _on_all(self, work: Callable[[int], _Result]) -> list[_Result]:
        """Runs `work(device)` for all devices at once, each in its own thread."""
        futures = [self._submit(d, partial(work, d)) for d in self.devices]
        return [future.result() for future in futures]

    def _in_order(self, found: list[Arrays]) -> Arrays:
        """The arrays of all devices in canonical order."""
        merged = {name: array for arrays in found for name, array in arrays.items()}
        return {n: merged[n] for n in parameter_shapes(self.config.model) if n in merged}

    def _cuda_devices(self) -> set[torch.device]:
        return {device for device in self._torch_devices if device.type == "cuda"}
