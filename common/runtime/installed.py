"""What an interpreter has of the packages named on its command line, without importing any.

It runs as a file, `python installed.py torch numpy`, under any Python 3: the harness asks another
environment with it before a worker starts there. So it imports nothing of this project.
"""

from __future__ import annotations

import json
import platform
import re
import sys

BUILD_FILES = {
    "torch": "version.py",
    "tensorflow": "python/platform/build_info.py",
    "paddle": "version/__init__.py",
}
"""Where a framework's wheel says what it was built for."""

DISTRIBUTIONS = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tf-nightly"),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu"),
}
"""Names under which a package is installed, where they are not its own."""

NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")


def version_in(text: str) -> str:
    """Return the version that a build file names; empty if none."""
    found = re.search(r"^(?:__version__|full_version)\s*=\s*'([^']+)'", text, re.MULTILINE)
    return found.group(1) if found else ""


def cuda_in(text: str) -> str:
    """Return the CUDA version that a build file names; empty for a CPU build."""
    found = re.search(r"\bcuda(?:_version)?\b'?(?:: [^=\n]*)?\s*[=,]\s*'(\d[\d.]*)'", text)
    return found.group(1) if found else ""


def build_file(package: str) -> str | None:
    """Return a framework's build file; None if it is not installed, empty if it has none."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder without code, as pip leaves some behind
        return None
    path = Path(spec.origin).parent / BUILD_FILES.get(package, "")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def installed(packages: list[str]) -> dict[str, object]:
    """Return Python's version, and those of the packages that are there, of CUDA and of NCCL."""
    from importlib.metadata import PackageNotFoundError, version

    def first_of(names: tuple[str, ...]) -> str:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                pass
        return ""

    found, cuda = {}, ""
    for package in packages:
        text = build_file(package)
        if text is None:
            continue
        known = version_in(text) or first_of(DISTRIBUTIONS.get(package, (package,)))
        found[package] = known or "unknown"
        cuda = cuda or cuda_in(text)
    return {
        "python": platform.python_version(),
        "packages": found,
        "cuda": cuda,
        "nccl": first_of(NCCL),
    }


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules are no packages
    print(json.dumps(installed(sys.argv[1:])))
