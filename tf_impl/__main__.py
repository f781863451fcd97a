"""`python -m tf_impl JOBS.json`: runs the file's jobs, exits with their status, or 2.

`python -m tf_impl train run.toml`, started by a launcher: one rank of a run over hosts.
"""

from __future__ import annotations

import sys

from common.runtime.importing import without_collections
from common.runtime.job import JobFile
from common.runtime.parent import end_with_parent
from common.runtime.worker import run_jobs
from common.spec.mesh import Mesh
from tf_impl.devices import configure
from tf_impl.ranks import RANKS, run_on_ranks


def main(arguments: list[str]) -> int:
    end_with_parent()
    if arguments[:1] == ["train"]:
        from common.cli.rank import train_rank  # the command line is nothing to a job file

        return train_rank("tensorflow", RANKS, arguments[1:])
    if len(arguments) != 1:
        return _refuse("usage: python -m tf_impl JOBS.json, or train [FILE.toml]")
    try:
        jobs = JobFile.read(arguments[0])
        in_ranks = [job for job in jobs.jobs if Mesh.of(job.config).replicas > 1]
        others = [job for job in jobs.jobs if job not in in_ranks]
        for field in ("track", "device"):  # TensorFlow's devices and kernels are a process' own
            if len({getattr(job.config, field) for job in jobs.jobs}) > 1:
                raise ValueError(f"the jobs of one file share {field}; expected one file for each")
        if len({job.config.drift == "onednn" for job in jobs.jobs}) > 1:
            raise ValueError(
                "drift = onednn is for a whole process; expected a file of jobs that all have it"
            )
        status = 0
        # First: a process that has started TensorFlow must not be forked.
        for mesh in sorted({(job.config.stages, job.config.replicas) for job in in_ranks}):
            own = [job for job in in_ranks if (job.config.stages, job.config.replicas) == mesh]
            # The first one's devices are there for all.
            own.sort(key=lambda job: -job.config.tensor_parallel)
            status |= run_on_ranks(own)
        if not others:
            return status
        count, largest = max(
            (
                (c.stages * c.replicas * c.tensor_parallel, c)
                for c in (job.config for job in others)
            ),
            key=lambda each: each[0],
        )
        onednn = largest.drift == "onednn"
        with without_collections():
            configure(count, largest.threads, largest.device, largest.track, onednn)
            from tf_impl.drift import switch  # after `configure`, since both import TensorFlow
            from tf_impl.engine import build_engine
    except ImportError as error:
        return _refuse(
            f"TensorFlow cannot be imported ({error}); expected: pip install 'triptych[cpu]'"
        )
    except ValueError as error:
        return _refuse(str(error))
    return status | run_jobs(JobFile(jobs=tuple(others)), build_engine, switch=switch)


def _refuse(line: str) -> int:
    print(f"tf_impl: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
