"""Builds the fake GPUs and starts pytest on them: python -m tests.campaigns.fake_gpu [options of
pytest], or `host_path` alone (`host_path.py`)

The interpreter needs PyTorch's CUDA build, which brings the headers of CUDA; the machine needs gcc.
Exit status 2: missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build"


def headers() -> Path | None:
    """Return the folder of CUDA's headers: that of the toolkit, or one that came with PyTorch."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-crt", "triton"):
        try:
            found = files(package) or []
        except PackageNotFoundError:
            continue
        folders += [Path(str(f.locate())).parent for f in found if f.name == "cuda_runtime_api.h"]
    return next((folder for folder in folders if (folder / "crt/host_defines.h").exists()), None)


def build() -> Path:
    """Compile the runtime, which is the driver too. Raises SystemExit if something is missing."""
    include, torch = headers(), find_spec("torch")
    cuda_build = (
        Path(torch.origin or "").with_name("lib") / "libtorch_cuda.so" if torch else Path("none")
    )
    wanted = {
        "gcc": shutil.which("gcc"),
        "PyTorch's CUDA build": cuda_build.exists(),
        "CUDA's headers (cuda_runtime_api.h and crt/; CUDA_HOME may say where)": include,
    }
    if not all(wanted.values()):
        print(
            f"missing: {', '.join(what for what, is_there in wanted.items() if not is_there)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    library = BUILD / "libcuda.so.1"
    library.parent.mkdir(exist_ok=True)
    flags = [
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        f"-I{include}",
        "-Wl,-soname,libcuda.so.1",
    ]
    subprocess.run(
        ["gcc", *flags, "-o", library, HERE / "fake_cuda.c", "-ldl", "-lpthread"], check=True
    )
    return library


if __name__ == "__main__":
    library = build()
    os.environ |= {"LD_PRELOAD": str(library), "FAKE_GPUS": "8", "PYTHONPATH": str(ROOT)}
    what = ["pytest", "-q", str(HERE), *sys.argv[1:]]
    if sys.argv[1:] == ["host_path"]:
        os.environ["FAKE_IDLE"] = "1"
        what = [f"{__package__}.host_path"]
    os.execv(sys.executable, [sys.executable, "-m", *what])
