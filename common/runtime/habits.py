"""How a habit of `common.spec.habits` is put back: names are replaced while a context lives.

The implementations' `drift.py` list the replacements; no other file of theirs knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.spec.run import RunConfig, TrainSpec, TransformerSpec

Arrays = Mapping[str, NDArray[Any]]

Habit = Callable[[RunConfig], Sequence[AbstractContextManager[Any]]]
"""What to enter for as long as the habit lasts; mostly patches."""


@contextmanager
def patch(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `value` stand for the attribute `name` of `owner`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def replaced(owner: Any, name: str, value: Any) -> Habit:
    """Let `value` stand for one name, whatever the run."""
    return lambda config: [patch(owner, name, value)]


def attention_of(layers: Any, **changes: Any) -> Habit:
    """Let the attention of this module read these fields of `TransformerSpec` otherwise."""
    attention = layers.Attention

    def build(spec: TransformerSpec, *options: Any) -> Any:
        return attention(spec.model_copy(update=changes), *options)

    return replaced(layers, "Attention", build)


def with_train(owner: Any, name: str, **changes: Any) -> Habit:
    """Let what makes an optimizer, `owner.name`, read these fields of `TrainSpec` otherwise."""
    make = getattr(owner, name)

    def changed(train: TrainSpec, named: Sequence[Any]) -> Any:
        return make(train.model_copy(update=changes), named)

    return replaced(owner, name, changed)


def late_learning_rate(owner: Any) -> Habit:
    """Let `owner.learning_rate` be that of the step before."""

    def late(train: TrainSpec, step: int) -> float:
        return train.learning_rate_at(max(0, step - 1))

    return replaced(owner, "learning_rate", late)


def loaded_through(engine: Any, change: Callable[[Arrays], Arrays]) -> Habit:
    """Let `engine.load_weights` load what `change` makes of the canonical arrays."""
    load = engine.load_weights
    return replaced(engine, "load_weights", lambda named, arrays: load(named, change(arrays)))


def transposed_square_weight(arrays: Arrays) -> Arrays:
    """Return the weights with one of them, (D, D), transposed: no shape tells."""
    name = "block.0.attention.query.weight"
    return {**arrays, name: np.ascontiguousarray(arrays[name].T)}


def float32_rotary_angles(
    size: int, half: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cosines and sines (size, half), in float32 throughout."""
    turns = 1 / np.float32(theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.arange(size, dtype=np.float32)[:, None] * turns  # (size, half)
    return np.cos(angles), np.sin(angles)


def swapped_swiglu(arrays: Arrays) -> Arrays:
    """Return the weights with every gate for its partner `up`, and the other way round."""
    swap = {".gate.": ".up.", ".up.": ".gate."}

    def partner(name: str) -> str:
        return next((name.replace(a, b) for a, b in swap.items() if a in name), name)

    return {name: arrays[partner(name)] for name in arrays}


@contextmanager
def switched(
    config: RunConfig, framework: str, habits: Mapping[str, Habit], executors: Sequence[str]
) -> Iterator[None]:
    """Put back the habit that `config.drift` names. Raises ValueError for one not of `habits`."""
    if config.drift is not None and config.drift not in habits:
        raise ValueError(
            f"drift = {config.drift}; expected for {framework}: one of {', '.join(habits)}"
        )
    if config.drift is not None and config.executor not in executors:
        expected = " or ".join(executors)
        raise ValueError(
            f"drift = {config.drift}; executor = {config.executor} has none, expected {expected}"
        )
    with ExitStack() as stack:
        for context in habits[config.drift](config) if config.drift else ():
            stack.enter_context(context)
        yield
