"""The machine and the code that a result came from."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from common.runtime.cpus import cpu_name, usable_cpus

PROJECT_ROOT = Path(__file__).resolve().parents[2]


class Machine(BaseModel):
    """The machine: without it a throughput figure means nothing."""

    model_config = ConfigDict(frozen=True)

    cpu: str
    cores: int
    """Physical cores of the machine."""
    usable_cpus: int
    """Logical CPUs that this process may use (`common.runtime.cpus`)."""
    memory_bytes: int
    system: str
    python: str

    @property
    def one_line(self) -> str:
        return (
            f"{self.cpu}, {self.usable_cpus} usable CPUs of {self.cores} cores, "
            f"{self.memory_bytes / 2**30:.0f} GiB, {self.system}, Python {self.python}"
        )


def this_machine() -> Machine:
    return Machine(
        cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        usable_cpus=usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def source_digest(*packages: str) -> str:
    """Return a digest of the project's source: `common` and these packages. A commit alone says
    nothing of files that were changed since, or of a project without git.
    """
    digest = hashlib.sha256()
    for package in ("common", *packages):
        for path in sorted((PROJECT_ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(PROJECT_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def git_commit() -> str | None:
    """Return the commit of the working tree, with "+changes" if files differ; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PROJECT_ROOT), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    if not (PROJECT_ROOT / ".git").exists():
        return None
    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
