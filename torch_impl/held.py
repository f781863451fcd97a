"""What autograd holds for the backward, in bytes, looked at once per chunk (`common.runtime.held`).

Differs: TensorFlow needs none: what its functions hand to one another is all that is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def saved_tensors(found: list[Tensor]) -> Iterator[None]:
    """Add to `found` whatever autograd saves inside."""

    def keep(tensor: Tensor) -> Tensor:
        detached = tensor.detach()  # the tensor itself would hold the graph that holds it
        found.append(detached)
        return detached

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        yield


def memory_bytes(tensors: Iterable[Tensor], not_counted: Iterable[Tensor] = ()) -> int:
    """Return the memory under `tensors`, each piece once, without that under `not_counted`."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    for tensor in not_counted:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
