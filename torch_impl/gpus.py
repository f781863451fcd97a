"""What this PyTorch makes of the machine's GPUs, for `triptych doctor`.

Differs: one framework's answer is enough there, and PyTorch's wheel brings CUDA and NCCL itself.
"""

from __future__ import annotations

import torch

from common.spec.gpus import visible_gpus


def nccl_version() -> str:
    """Of the library that this PyTorch brings; "none" where it was built without."""
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"


def gpus() -> str:
    """Return what this PyTorch makes of the machine's GPUs, in a line, with what to do where it
    sees none.
    """
    wheel, found = torch.version.cuda, visible_gpus()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
        return f"sees {names}; CUDA {wheel}, NCCL {nccl_version()}"
    if not found:
        return f"computes on the CPU: no NVIDIA driver answers; CUDA {wheel or 'not built in'}"
    if wheel is None:
        return (
            "computes on the CPU: it is a CPU build; expected a CUDA build, from "
            "https://pytorch.org/get-started/locally"
        )
    return (
        f"computes on the CPU: it sees no GPU though the driver {found[0].driver} has "
        f"{len(found)}; expected a driver for "
        f"CUDA {wheel} or newer, or a PyTorch that was built for an older CUDA"
    )
