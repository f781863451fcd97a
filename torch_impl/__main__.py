"""`python -m torch_impl JOBS.json`: runs the file's jobs, exits with their status, or 2.

`python -m torch_impl train run.toml`, started by a launcher: one rank of a run over hosts.
"""

from __future__ import annotations

import sys

from common.runtime.importing import without_collections
from common.runtime.job import JobFile
from common.runtime.parent import end_with_parent
from common.runtime.ranks import mesh_of
from common.runtime.worker import run_jobs
from torch_impl.devices import configure
from torch_impl.ranks import RANKS, run_on_ranks


def main(arguments: list[str]) -> int:
    end_with_parent()
    if arguments[:1] == ["train"]:
        from common.cli.rank import train_rank  # the command line is nothing to a job file

        return train_rank("torch", RANKS, arguments[1:])
    if len(arguments) != 1:
        return _refuse("usage: python -m torch_impl JOBS.json, or train [FILE.toml]")
    try:
        jobs = JobFile.read(arguments[0])
        largest = max((job.config for job in jobs.jobs), key=lambda config: config.stages)
        with without_collections():
            configure(largest.stages, largest.threads, largest.device)
            from torch_impl.drift import switch  # after `configure`, since both import PyTorch
            from torch_impl.engine import build_engine
            from torch_impl.shard_threads import are_threads, run_lines
    except ImportError as error:
        return _refuse(
            f"PyTorch cannot be imported ({error}); expected: pip install 'triptych[cpu]'"
        )
    except ValueError as error:
        return _refuse(str(error))
    in_ranks = [
        job
        for job in jobs.jobs
        if job.config.executor == "native"
        or (mesh_of([job]).lines > 1 and not are_threads(job.config))
    ]
    status = 0
    # First, since a process with threads must not fork.
    for mesh in dict.fromkeys(mesh_of([job]) for job in in_ranks):
        status |= run_on_ranks([job for job in in_ranks if mesh_of([job]) == mesh], switch)
    others = [job for job in jobs.jobs if job not in in_ranks]
    left = JobFile(jobs=tuple(others))
    return status | run_jobs(left, build_engine, switch=switch, run=run_lines)


def _refuse(line: str) -> int:
    print(f"torch_impl: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
