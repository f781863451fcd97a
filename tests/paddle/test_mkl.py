"""Which kernels of its bundled MKL Paddle runs (`paddle_impl.mkl`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paddle_impl import mkl

ZEN_2 = ["fpu", "sse2", "pclmulqdq", "ssse3", "fma", "avx", "abm", "bmi1", "avx2", "bmi2"]
ZEN_4 = [*ZEN_2, "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "avx512_bf16"]
BULLDOZER = ["fpu", "sse2", "pclmulqdq", "ssse3", "avx", "abm", "fma4"]


@pytest.mark.parametrize(
    ("vendor", "flags", "environ", "chosen"),
    [
        ("GenuineIntel", ZEN_4, {}, None),
        ("GenuineIntel", ZEN_2, {}, None),
        ("AuthenticAMD", ZEN_4, {}, "7"),
        ("AuthenticAMD", ZEN_2, {}, "5"),
        ("AuthenticAMD", BULLDOZER, {}, None),
        ("AuthenticAMD", [flag for flag in ZEN_2 if flag != "fma"], {}, None),
        ("AuthenticAMD", [flag for flag in ZEN_4 if flag != "avx512vl"], {}, "5"),
        ("AuthenticAMD", [flag for flag in ZEN_4 if flag != "avx2"], {}, None),
        ("HygonGenuine", ZEN_2, {}, "5"),
        ("CentaurHauls", ZEN_2, {}, "5"),
        ("Shanghai", BULLDOZER, {}, None),
        ("", ["fp", "asimd", "sve"], {}, None),
        ("", [], {}, None),
        ("AuthenticAMD", ZEN_4, {"MKL_DEBUG_CPU_TYPE": "5"}, None),
        ("AuthenticAMD", ZEN_4, {"MKL_DEBUG_CPU_TYPE": ""}, None),
        ("AuthenticAMD", ZEN_4, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, None),
        ("AuthenticAMD", ZEN_4, {"MKL_CBWR": "COMPATIBLE"}, None),
        ("AuthenticAMD", ZEN_4, {"OMP_NUM_THREADS": "1"}, "7"),
    ],
)
def test_every_processor_gets_the_kernels_that_it_can_run(
    vendor: str, flags: list[str], environ: dict[str, str], chosen: str | None
) -> None:
    assert mkl.cpu_type(vendor, flags, environ) == chosen


def kernels(vendor: str | None = None, **environ: str) -> str:
    """What a process whose processor is of `vendor` runs, by its `environment`."""
    code = f"""
import json, os
from unittest import mock
from paddle_impl import mkl
vendor = {vendor!r}
if vendor:
    with mock.patch.object(mkl, "processor", lambda given=mkl.processor(): (vendor, given[1])):
        mkl.choose_kernels()
from paddle_impl import devices
devices.configure(1, 1, "cpu")
import paddle
paddle.matmul(paddle.ones([8, 8]), paddle.ones([8, 8]))
print(json.dumps(devices.environment(["cpu"])["kernels"]))
"""
    own = {name: value for name, value in os.environ.items() if name not in mkl.USERS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=own | environ, capture_output=True, text=True, check=True
    )
    return str(json.loads(done.stdout.splitlines()[-1]))


needs_mkl = pytest.mark.skipif(mkl.kernels() is None, reason="a Paddle without MKL")


@needs_mkl
def test_what_ran_is_read_back_and_the_users_choice_stays() -> None:
    assert kernels(MKL_DEBUG_CPU_TYPE="3") == "MKL SSE4.2"


@needs_mkl
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_processor_of_another_vendor_gets_an_intel_ones_kernels(tmp_path: Path) -> None:
    """MKL's question for an Intel processor is answered with no, as on one of AMD."""
    (tmp_path / "vendor.c").write_text("int mkl_serv_intel_cpu_true(void) { return 0; }\n")
    library = tmp_path / "vendor.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "vendor.c"], check=True)
    assert kernels("AuthenticAMD", LD_PRELOAD=str(library), MKL_DEBUG_CPU_TYPE="") == "MKL SSE2"
    best = {"7": "AVX-512", "5": "AVX2", None: "SSE2"}[
        mkl.cpu_type("AuthenticAMD", mkl.processor()[1], {})
    ]
    assert kernels("AuthenticAMD", LD_PRELOAD=str(library)) == f"MKL {best}"
