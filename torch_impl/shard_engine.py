"""The engine of one shard of its stages. Arrays are whole outside of an engine: cut on their way
in, joined on their way out.

The other shards are processes (`torch_impl.rank_engine`) or threads (`torch_impl.shard_threads`);
all call the same methods in the same order.

Differs: Paddle's shards are always processes, TensorFlow's always devices of one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from common.runtime.decode import Feed
from common.runtime.engine import Arrays
from common.spec.data import Batch
from common.spec.parameters import TensorKey
from common.spec.run import RunConfig
from common.spec.shards import cut_axis, joined, shard_of, shards_of
from torch_impl.engine import PipelineEngine

_Key = TypeVar("_Key")
_Values = TypeVar("_Values")


class ShardEngine(PipelineEngine):
    """What is the same in a process and in a thread; they say how values are gathered."""

    def reset(self, weights: Mapping[str, NDArray[Any]]) -> None:
        super().reset(self._cut(weights))

    def probe_units(
        self,
        batch: Batch,
        inputs: Mapping[str, NDArray[Any]],
        output_gradients: Mapping[str, NDArray[Any]],
    ) -> dict[TensorKey, NDArray[Any]]:
        axis = 2 if self.shards.columns else None  # (B, S, V)
        own = shard_of(output_gradients["head"], axis, self.shards.shard, self.shards.count)
        found = super().probe_units(batch, inputs, {**output_gradients, "head": own})
        return self._whole(found, lambda key: key.tensor)

    def decode(self, feed: Feed) -> None:
        """Raise ValueError: replicas and shards train, and text is generated without them."""
        raise ValueError("replicas and shards do not generate; expected one of each")

    def optimizer_state(self) -> Arrays:
        return self._whole(super().optimizer_state(), lambda key: key.partition("/")[2])

    def load_optimizer_state(self, state: Mapping[str, NDArray[Any]], steps_done: int) -> None:
        super().load_optimizer_state(self._cut(state), steps_done)

    def weights(self) -> Arrays:
        return self._whole(super().weights(), str)

    def gradients(self) -> Arrays:
        return self._whole(super().gradients(), str)

    def set_gradients(self, gradients: Mapping[str, NDArray[Any]]) -> None:
        super().set_gradients(self._cut(gradients))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._of_all(list(values)), strict=True)]

    def _of_all(self, values: _Values) -> list[_Values]:
        """The values of all that train together, in their order."""
        raise NotImplementedError

    def _of_shards(self, values: _Values) -> list[_Values]:
        """The values of all shards of what is here: of one replica, all."""
        return self._of_all(values)

    def _cut(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        return shards_of(self.config, arrays, self.shards.shard)

    def _whole(
        self, own: dict[_Key, NDArray[Any]], name: Callable[[_Key], str]
    ) -> dict[_Key, NDArray[Any]]:
        return whole_arrays(self.config, own, name, self._of_shards)

    def _counts(self, name: str) -> bool:
        """Each replica has all of the norm, and each shard what is not cut."""
        is_cut = cut_axis(self.config, name) is not None
        return self.replica == 0 and (is_cut or self.shards.shard == 0)

    def _everybodys(self, values: list[float]) -> list[float]:
        return [value for row in self._of_all(values) for value in row]


def whole_arrays(
    config: RunConfig,
    own: dict[_Key, NDArray[Any]],
    name: Callable[[_Key], str],
    of_shards: Callable[[Any], list[Any]],
) -> dict[_Key, NDArray[Any]]:
    """Return the whole arrays of which all shards, which call this together, have parts; what is
    not cut, as this shard has it. `name` is a key's canonical one, `of_shards` gathers.
    """
    axes = {key: cut_axis(config, name(key)) for key in own}
    if not any(axis is not None for axis in axes.values()):
        return own
    pieces = of_shards({key: array for key, array in own.items() if axes[key] is not None})
    return {
        key: array if (axis := axes[key]) is None else joined([p[key] for p in pieces], axis)
        for key, array in own.items()
    }
