"""What the engines of the baselines answer alike: they have no stage of ours to look into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from common.runtime.decode import Feed
from common.runtime.executor import Event
from common.schedule.action import Action
from common.spec.data import Batch
from common.spec.parameters import TensorKey
from common.spec.run import RunConfig


class BaselineEngine:
    """The part of `common.runtime.engine.Engine` that no baseline can do or can say."""

    config: RunConfig
    devices: tuple[int, ...] = (0,)
    on_action: Callable[[int, Action | None], None]  # set by the harness; no baseline calls it
    _events: Sequence[Event] = ()

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        """Raise ValueError: a baseline runs the model as a whole."""
        raise ValueError(
            f"executor = {self.config.executor} does not run units alone; expected table"
        )

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return `values`: a baseline has no replicas."""
        return list(values)

    def decode(self, feed: Feed) -> None:
        """Raise ValueError: a baseline trains."""
        raise ValueError(f"executor = {self.config.executor} does not generate; expected table")

    def events(self) -> dict[int, list[Event]]:
        """Return what was recorded, which for a plain loop is nothing."""
        return {self.devices[0]: list(self._events)}

    def held_bytes_peak(self) -> dict[int, int]:
        """Return nothing: what a framework's own loop holds is not counted."""
        return {}

    def in_flight_peak(self) -> dict[int, int]:
        """Return nothing, as above."""
        return {}

    def close(self) -> None:
        """Do nothing; an engine that holds more than memory does."""
