"""What autograd holds for the backward, in bytes: looked at once per chunk, counted by `common.runtime.held`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from paddle import Tensor
from paddle.autograd import saved_tensors_hooks


@contextmanager
def saved_tensors(found: list[Tensor]) -> Iterator[None]:
    """Adds to `found` whatever autograd saves inside."""

    def keep(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:  # a layer without bias
            return None
        found.append(tensor.detach())
        return tensor  # Differs: with a detached one the backward of LayerNorm crashes; the backward ends the cycle

    with saved_tensors_hooks(keep, lambda kept: kept):
        yield


def memory_bytes(tensors: Iterable[Tensor], not_counted: Iterable[Tensor] = ()) -> int:
    """The memory under `tensors`, each piece once, without that under `not_counted`."""
    pieces = {tensor.data_ptr(): tensor.numel().item() * tensor.element_size() for tensor in tensors}
    for tensor in not_counted:
        pieces.pop(tensor.data_ptr(), None)
    return sum(pieces.values())
