"""The memory that cuBLAS keeps for every stream.

Differs: the others' stages share TensorFlow's streams, or are processes, whose end frees it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

workspaces_freed = 0
"""How often, in this process. What was recorded before must not be replayed: its memory is gone."""


def free_workspaces(used: Iterable[torch.device]) -> None:
    """Give back what cuBLAS holds for every thread's stream (32 MiB each, set by `configure`).

    For all of the process: others get theirs anew with their next product.
    """
    if any(device.type == "cuda" for device in used):
        global workspaces_freed
        workspaces_freed += 1
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()  # they go back to the allocator, and from there to the driver
