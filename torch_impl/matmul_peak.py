"""`python -m torch_impl.matmul_peak DTYPE THREADS DEVICE`: `common.runtime.matmul_peak` for what
NumPy cannot, cards and bfloat16.

Differs: PyTorch's rate is the peak that all frameworks' runs are compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from common.runtime.matmul_peak import SIDE, best_rate
from common.runtime.parent import end_with_parent
from torch_impl import devices

SIDES = {"cpu": SIDE, "cuda": 8192}


def main(arguments: Sequence[str]) -> int:
    """Measure one device, a card's first where there are several."""
    end_with_parent()
    dtype, threads, device = arguments
    devices.configure(1, int(threads), device)
    import torch

    side = SIDES[device]
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))

    def product() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    said = {"flops_per_second": best_rate(product, side), "by": f"PyTorch {torch.__version__}"}
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
