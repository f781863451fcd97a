"""One process per stage, replica and shard: started together, ended together.

The framework is imported once and then forked, which starts two stages in about half the time of
its own launcher; for GPUs every rank is spawned. A rank dies with its parent; if one rank fails,
the others end at once, and the jobs after the failed one get new ranks.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal

from common.io.edges import write_file
from common.runtime.engine import Engine
from common.runtime.job import Job, JobFile
from common.runtime.launchers import Launched
from common.runtime.meeting import Store
from common.runtime.patience import Patience
from common.runtime.signals import heeding
from common.runtime.text_store import TextStore
from common.runtime.worker import Switch, no_drift, run_jobs
from common.runtime.world import World
from common.schedule import generators
from common.spec.mesh import Mesh
from common.spec.run import RunConfig

GRACE_SECONDS = 5.0
"""How long other ranks may compute, or be idle, to record how a failure looked to them."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ranks:
    """What an implementation says about its processes. Spawned ones find the functions by name."""

    name: str
    """Of the implementation, for messages."""
    join: Callable[[World, RunConfig], Callable[[RunConfig], Engine]]
    """(this process among all, first config) -> build_engine; returns when all have joined."""
    wait_for_all: Callable[[int], None]
    """(number of ranks): returns when all have called it."""
    start_method: Literal["fork", "spawn"] = "fork"
    """spawn where the ranks use GPUs: CUDA, once asked anything, does not work after a fork."""
    connect: Callable[[Launched, float], Store] = TextStore
    """(this process as launched, seconds to wait) -> the store of the run. Raises UsageError."""


def run_on_ranks(ranks: Ranks, jobs: Sequence[Job], switch: Switch = no_drift) -> int:
    """Run the jobs, which share a mesh and `device`, on one process per stage, replica and shard.
    Returns the exit status.

    `switch` is that of `common.runtime.worker.run_jobs`; every rank calls it.
    """
    status, remaining = 0, list(jobs)
    with heeding((signal.SIGTERM, signal.SIGINT), _leave):
        while remaining:
            failed = _run_until_failure(ranks, remaining, switch)
            if failed is None:
                break
            status, remaining = 1, remaining[failed + 1 :]
    return status


def _run_until_failure(ranks: Ranks, jobs: Sequence[Job], switch: Switch) -> int | None:
    """Return the index of the first job that failed, or None."""
    context: Any = multiprocessing.get_context(ranks.start_method)
    size = mesh_of(jobs).size
    endpoints = _free_endpoints(size)
    # Shared memory: the job that each rank is at. A rank that is killed cannot say so any more, and
    # the smallest entry is the first job that not all ranks have ended.
    progress = context.Array("i", size, lock=False)
    arguments = (ranks, jobs, switch, dict(generators.kept), endpoints, os.getpid(), progress)
    processes = [
        context.Process(target=_rank_main, args=(rank, *arguments), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        if _all_end_well(processes):
            return None
        failed: int = min(progress)
        _report(ranks.name, jobs[failed], processes)
        return failed
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def mesh_of(jobs: Sequence[Job]) -> Mesh:
    """Return who computes what in these jobs, which share it."""
    return Mesh.of(jobs[0].config)


def _all_end_well(processes: Sequence[Any]) -> bool:
    """Wait until all ranks end; after the first failure, for the grace time only."""
    # A sentinel is a file descriptor that becomes readable when its process ends.
    running = {process.sentinel: process for process in processes}
    patience = None
    while running:
        ended = wait(list(running), None if patience is None else POLL_SECONDS)
        if patience is not None and patience.is_over():
            return False
        # The others may take a moment to notice a lost connection, and their tracebacks say more.
        if any(_exit_code(running.pop(sentinel)) for sentinel in ended) and patience is None:
            patience = Patience(os.getpid(), GRACE_SECONDS, GRACE_SECONDS)
    return patience is None


def _exit_code(process: Any) -> int:
    """Return the exit code of a process whose sentinel is ready, a moment before the code is."""
    process.join()
    return int(process.exitcode)


def _report(name: str, job: Job, processes: Sequence[Any]) -> None:
    """Report which rank was ended from outside, since it could not do so itself."""
    for rank, process in enumerate(processes):
        if process.exitcode is not None and process.exitcode < 0:
            mesh = mesh_of([job])
            who, number = mesh.name(rank), -process.exitcode
            line = f"{who} was ended by {signal.Signals(number).name}"
            print(f"{name}: {line}", file=sys.stderr, flush=True)
            failed = f"failed-{mesh.place(rank).stage}.txt"
            write_file(job.folders[mesh.line(rank)] / failed, line + "\n")


def _rank_main(
    rank: int,
    ranks: Ranks,
    jobs: Sequence[Job],
    switch: Switch,
    schedules: Mapping[str, str],
    endpoints: Sequence[str],
    parent: int,
    progress: Any,
) -> None:
    """Run one rank. It ends with status 1 at the first job that fails here or on another rank."""
    _die_with(parent)
    world = World(rank, tuple(endpoints))
    mesh = mesh_of(jobs)
    stage, line = mesh.place(rank).stage, mesh.line(rank)
    try:
        generators.kept.update(schedules)  # a spawned rank has none
        build_engine = ranks.join(world, jobs[0].config)
        for index, job in enumerate(jobs):
            progress[rank] = index
            own = JobFile(jobs=(job.of_line(line),))
            if run_jobs(own, build_engine, first_device=stage, switch=switch):
                # Not sys.exit: whoever waits for this rank is to know now, and what the framework
                # would say to the other ranks at exit could hang.
                sys.stdout.flush()
                os._exit(1)
            # No rank goes on before all have ended this job well.
            ranks.wait_for_all(len(endpoints))
    except Exception:
        text = traceback.format_exc()
        print(text, flush=True)
        write_file(jobs[progress[rank]].folders[line] / f"failed-{stage}.txt", text)
        sys.stdout.flush()
        os._exit(1)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, in whatever way (prctl(2), PR_SET_PDEATHSIG)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the parent ends its ranks
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave(number: int, frame: Any) -> None:
    """Turn a signal into SystemExit, so that the ranks are ended on the way out."""
    raise SystemExit(128 + number)


def _free_endpoints(count: int) -> list[str]:
    """Return addresses on the loopback device that are free."""
    # All open at once, so that no port is given twice. Between here and the ranks' own bind another
    # program could take one; then joining fails, with a message of its own.
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    endpoints = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return endpoints
