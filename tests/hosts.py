"""Hosts on one machine: network namespaces, joined by a switch in a namespace of its own.

    host 1  10.77.0.1 ──┐
    host 2  10.77.0.2 ──┼── switch
    ...                 ┘

Whatever runs in a namespace sees its own loopback device and its one address, and nothing of the
machine's network. It takes root.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def ip(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["ip", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def with_another_wall_clock(folder: Path) -> dict[str, str]:
    """Build `wall_clock.c` in the folder; return the variable that gives it to a process."""
    library = folder / "wall_clock.so"
    source = Path(__file__).with_name("wall_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


class Hosts:
    """Namespaces that live as long as the context."""

    def __init__(self, count: int, name: str = "t") -> None:
        self.addresses = [f"10.77.0.{n}" for n in range(1, count + 1)]
        self._switch = f"{name}{os.getpid()}-switch"
        self.names = [f"{name}{os.getpid()}-{n}" for n in range(1, count + 1)]

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self._switch)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"hosts are network namespaces, which this machine does not allow: {error}")
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")
        for n, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ends = ("eth0", "netns", name, "type", "veth", "peer", f"v{n}", "netns", self._switch)
            ip("link", "add", *ends)
            ip("-n", self._switch, "link", "set", f"v{n}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for host in range(len(self.names)):
            self.kill(host)
        for name in (*self.names, self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def start(
        self,
        host: int,
        words: list[str],
        log: Path,
        env: Mapping[str, str] = {},
        own: Sequence[Path] = (),
        ahead_seconds: int = 0,
    ) -> subprocess.Popen[Any]:
        """Start this Python on a host (from 0), in the log's folder; with `own` folders, empty at
        first, that no other process sees, and a clock (CLOCK_MONOTONIC) that is ahead.
        """
        command = ["ip", "netns", "exec", self.names[host]]
        if own or ahead_seconds:
            mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(path))}; " for path in own)
            command += ["unshare", "--mount", "--time", "--monotonic", str(ahead_seconds), "--fork"]
            command += ["sh", "-c", f'{mounts}exec "$@"', "sh"]
        command += [sys.executable, *words]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": paths, **env}
        with log.open("wb") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, env=variables, cwd=log.parent
            )

    def processes(self, host: int) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.names[host]).stdout.split()]

    def kill(self, host: int) -> None:
        """End all processes of a host at once, as a lost power supply does."""
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, host: int) -> None:
        ip("-n", self._switch, "link", "set", f"v{host}", "down")

    def heal(self, host: int) -> None:
        ip("-n", self._switch, "link", "set", f"v{host}", "up")

    @contextlib.contextmanager
    def without(self, host: int) -> Iterator[None]:
        """Cut a host off for a while."""
        self.cut(host)
        try:
            yield
        finally:
            self.heal(host)
