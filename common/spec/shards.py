"""What tensor parallelism cuts, and how (Shoeybi et al. 2019, section 3): the one place that knows.

A block on two shards:

           ┌─ Q K V, heads 0 ── output, rows 0 ─┐         ┌─ up, columns 0 ── down, rows 0 ─┐
    x ─ f ─┤                                    ├─ g ─ f ─┤                                 ├─ g ─ x
           └─ Q K V, heads 1 ── output, rows 1 ─┘         └─ up, columns 1 ── down, rows 1 ─┘

    f   forward: nothing                    backward: the sum of dx over the shards
    g   forward: the sum over the shards    backward: nothing; then comes the bias

Weights are canonical (in, out) outside an engine: cut on load (`shard_of`), joined on save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec.parameters import TOKEN_EMBEDDING
from common.spec.run import RunConfig

Array = NDArray[Any]

COLUMNS = ("query", "key", "value", "gate", "up")
"""Layers whose outputs are cut: by heads, or by features of the feed-forward layer."""
ROWS = ("output", "down")
"""Layers whose inputs are cut. Their bias is whole, and added once, behind the sum."""


class ShardSizes:
    """What one of a stage's shards has of a layer: the base of each framework's `Shards`."""

    count: int
    shard: int
    columns: tuple[int, ...]
    """How many tokens of the vocabulary each shard has; empty where each has all."""

    def part(self, size: int) -> int:
        """Return a shard's share of heads or features."""
        return size // self.count

    def tokens(self, vocab_size: int) -> int:
        """Return how many tokens' rows of the embedding, and columns of the head, are here."""
        return self.columns[self.shard] if self.columns else vocab_size

    @property
    def first_token(self) -> int:
        return sum(self.columns[: self.shard])


def cut_axis(config: RunConfig, name: str) -> int | None:
    """Return the axis along which a parameter of this name is cut; None where it stays whole."""
    of_vocabulary = name in (TOKEN_EMBEDDING, "head.output.weight")
    if config.tensor_parallel == 1 or (of_vocabulary and not config.vocab_parallel):
        return None
    return axis_of(name)


def axis_of(name: str) -> int | None:
    """Return the same where all is cut that can be, the vocabulary too."""
    if name in (TOKEN_EMBEDDING, "head.output.weight"):
        return {TOKEN_EMBEDDING: 0}.get(name, 1)
    stem, _, kind = name.rpartition(".")
    layer = stem.rpartition(".")[2]
    if layer in COLUMNS:
        return 1 if kind == "weight" else 0
    return 0 if layer in ROWS and kind == "weight" else None


def shard_of(array: Array, axis: int | None, shard: int, shards: int) -> Array:
    """Return a shard's part of an array. The vocabulary may be uneven: 10 in 4 are 3, 3, 2, 2."""
    return array if axis is None else np.array_split(array, shards, axis)[shard]


def shard_shape(config: RunConfig, name: str, shape: Sequence[int], shard: int) -> tuple[int, ...]:
    """Return the shape of a shard's part of the parameter of canonical `name` and `shape`."""
    axis = cut_axis(config, name)
    size, larger = (0, 0) if axis is None else divmod(shape[axis], config.tensor_parallel)
    return tuple(size + (shard < larger) if i == axis else n for i, n in enumerate(shape))


def shards_of(config: RunConfig, arrays: Mapping[str, Array], shard: int) -> dict[str, Array]:
    """Return a shard's part of arrays by canonical name, or by `first_moment/<name>`."""
    return {
        key: shard_of(array, cut_axis(config, key.split("/")[-1]), shard, config.tensor_parallel)
        for key, array in arrays.items()
    }


def joined(pieces: Sequence[Array], axis: int) -> Array:
    """Return the whole array of its pieces, in the order of the shards."""
    return np.concatenate(pieces, axis)


def own_tokens(config: RunConfig, shard: int) -> range:
    """Return the tokens whose rows of the embedding, and columns of the head, a shard has."""
    # 10 tokens over 4 shards: two have 3 and begin at 0 and 3, two have 2, from 6 and 8 on.
    if not config.vocab_parallel:
        return range(config.model.vocab_size)
    size, larger = divmod(config.model.vocab_size, config.tensor_parallel)
    first = shard * size + min(shard, larger)
    return range(first, first + size + (shard < larger))
