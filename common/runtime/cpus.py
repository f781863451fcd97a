"""How many CPUs a run may use, counted in one way everywhere."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the logical CPUs in the affinity mask, or fewer by a cgroup's quota, rounded up."""
    linux = hasattr(os, "sched_getaffinity")
    affinity = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    # Rounded up: with a quota of 1.5 CPUs a second thread still gains half a CPU.
    return max(1, min([affinity, *map(math.ceil, cgroup_quotas())]))


def cpu_info() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first processor; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    # Backwards, since the file has a block for each processor and the first is to win.
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Return the model's name; the platform's own words where it has none, as on ARM."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def threads_per_stage(stages: int, threads: int | None) -> int:
    """Return each stage's CPU threads if `threads` (default: all usable CPUs) are shared."""
    return max(1, (threads or usable_cpus()) // stages)


def cgroup_quotas(mounted: Path = CGROUPS, own: Path = OWN_CGROUPS) -> Iterator[float]:
    """Return the CPUs' worth of time that this process' cgroups and those above allow.

    (cgroups(7), v1 and v2.) A container may see its cgroup under another name than the one outside;
    its root is checked in any case.
    """
    with contextlib.suppress(OSError, ValueError):  # no Linux, or nothing mounted
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = mounted / "cpu" if controllers else mounted
            folder = root / path.lstrip("/")
            # The tightest of all levels counts: a group gets no more than those above it.
            for each in [folder, *folder.parents]:
                if each.is_relative_to(root):
                    yield from _quota(each)


def _quota(folder: Path) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):  # v2; "max 100000" is no quota
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        yield int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # v1; -1 is no quota
        quota_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        if quota_us > 0:
            yield quota_us / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
