"""`python -m paddle_impl JOBS.json`: runs the file's jobs, exits with their status, or 2.

`python -m paddle_impl train run.toml`, started by a launcher: one rank of a run over hosts.

Differs: this process starts one per stage, replica and shard, and waits (`paddle_impl.ranks`).
"""

from __future__ import annotations

import sys

from common.runtime.importing import without_collections
from common.runtime.job import JobFile
from common.runtime.parent import end_with_parent
from common.runtime.ranks import mesh_of
from paddle_impl.devices import configure
from paddle_impl.ranks import RANKS, run_on_ranks


def main(arguments: list[str]) -> int:
    end_with_parent()
    if arguments[:1] == ["train"]:
        from common.cli.rank import train_rank  # the command line is nothing to a job file

        return train_rank("paddle", RANKS, arguments[1:])
    if len(arguments) != 1:
        return _refuse("usage: python -m paddle_impl JOBS.json, or train [FILE.toml]")
    try:
        jobs = JobFile.read(arguments[0]).jobs
        first = jobs[0].config
        if len({(mesh_of([job]), job.config.device) for job in jobs}) > 1:
            raise ValueError(
                "the jobs of one file share their mesh and device; expected one file for each"
            )
        with without_collections():
            configure(mesh_of(jobs).size, first.threads, first.device)
            import paddle_impl.engine  # noqa: F401  after `configure`, since it imports Paddle; the ranks inherit it
    except ImportError as error:
        return _refuse(
            f"PaddlePaddle cannot be imported ({error}); expected: pip install 'triptych[cpu]'"
        )
    except ValueError as error:
        return _refuse(str(error))
    return run_on_ranks(jobs)


def _refuse(line: str) -> int:
    print(f"paddle_impl: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
