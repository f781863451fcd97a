"""Which of its kernels the MKL in Paddle's wheel runs, chosen before Paddle computes anything.

Differs: PyTorch and TensorFlow need no such file. Paddle's wheel carries MKL 2019.0.5
(libs/libmklml_intel.so), which asks the processor for its vendor and on every vendor but Intel runs
its SSE2 kernels, whatever the processor can do: a 256 x 256 x 1024 product takes twice to four
times as long. MKL_DEBUG_CPU_TYPE names the kernels instead, and this release still obeys it (those
since 2020.1 do not). It is obeyed blindly, without a look at the processor or at MKL_CBWR.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from common.runtime.cpus import cpu_info

KERNELS = {
    0: "SSE2",
    2: "SSSE3",
    3: "SSE4.2",
    4: "AVX",
    5: "AVX2",
    6: "AVX-512 (Xeon Phi)",
    7: "AVX-512",
}
"""What `mkl_serv_cpu_detect` returns and, up to 7, MKL_DEBUG_CPU_TYPE means (1 as 0)."""
AVX2 = frozenset({"avx2", "fma", "bmi1", "bmi2", "abm", "pclmulqdq"})
AVX512 = AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
"""The features, as in /proc/cpuinfo, without which MKL does not run these kernels on Intel."""
USERS = ("MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Variables by which users choose kernels; where one is set, nothing is chosen here."""


def cpu_type(vendor: str, flags: Collection[str], environ: Mapping[str, str]) -> str | None:
    """Return the MKL_DEBUG_CPU_TYPE that gives this processor the kernels an Intel one gets; None:
    leave it alone.

    `vendor` and `flags` as in /proc/cpuinfo; other architectures have no vendor there.
    """
    if vendor in ("", "GenuineIntel") or any(name in environ for name in USERS):
        return None
    # The best that it has; 7 on a processor without AVX-512 would be an illegal instruction.
    return "7" if AVX512.issubset(flags) else "5" if AVX2.issubset(flags) else None


def processor() -> tuple[str, frozenset[str]]:
    """Return the first processor's vendor and flags; nothing where the system does not say."""
    said = cpu_info()
    return said.get("vendor_id", ""), frozenset(said.get("flags", "").split())


def choose_kernels() -> None:
    """Set MKL_DEBUG_CPU_TYPE where MKL would choose badly."""
    chosen = cpu_type(*processor(), os.environ)
    if chosen is not None:
        os.environ["MKL_DEBUG_CPU_TYPE"] = chosen


def kernels() -> str | None:
    """Return what MKL runs in this process, as it says; None for a Paddle without this MKL."""
    import paddle

    path = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    if not path.exists():
        return None
    # Loaded by Paddle already: this is the same copy, with what it has detected.
    found = ctypes.CDLL(str(path)).mkl_serv_cpu_detect()
    return KERNELS.get(found, f"type {found}")
