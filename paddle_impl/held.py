"""What autograd holds for the backward, in bytes, looked at once per chunk (`common.runtime.held`).

Differs: TensorFlow needs none: what its functions hand to one another is all that is held.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paddle import Tensor
from paddle.autograd import saved_tensors_hooks


@dataclass(frozen=True, weakref_slot=True, slots=True)
class Saved:
    """A tensor that autograd has saved, for as long as it keeps it.

    Differs: the tensor itself, since with a detached one the backward of LayerNorm crashes; the
    backward ends the cycle.
    """

    tensor: Tensor | None  # None: a layer without bias


class SavedTensors:
    """What autograd saved and still keeps: a recomputed piece lets go within its forward."""

    def __init__(self) -> None:
        self._saved: list[weakref.ref[Saved]] = []

    def add(self, tensor: Tensor | None) -> Saved:
        saved = Saved(tensor)
        self._saved.append(weakref.ref(saved))
        return saved

    def kept(self) -> list[Tensor]:
        alive = [saved.tensor for reference in self._saved if (saved := reference()) is not None]
        return [tensor for tensor in alive if tensor is not None]


@contextmanager
def saved_tensors() -> Iterator[SavedTensors]:
    """Note whatever autograd saves inside."""
    found = SavedTensors()
    with saved_tensors_hooks(found.add, lambda saved: saved.tensor):
        yield found


def memory_bytes(tensors: Iterable[Tensor], not_counted: Iterable[Tensor] = ()) -> int:
    """Return the memory under `tensors`, each piece once, without that under `not_counted`."""
    pieces = {tensor.data_ptr(): tensor.size * tensor.element_size() for tensor in tensors}
    for tensor in not_counted:
        pieces.pop(tensor.data_ptr(), None)
    return sum(pieces.values())
