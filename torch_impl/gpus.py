"""The version of NCCL that this PyTorch brings.

Differs: the others do not say it.
"""

from __future__ import annotations

import torch


def nccl_version() -> str:
    """Of the library that this PyTorch brings; "none" where it was built without."""
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
