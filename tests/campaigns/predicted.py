"""How near is the time model? Predicted beside measured steps for a grid of (p, schedule, v, m) in
every framework, and what it costs to trust the plan that is called best; a table of
docs/planning.md. Run it in the repository's root, with nothing else running.

    python -m tests.campaigns.predicted --out FOLDER     preset small, parity checked, 25 min
    python -m tests.campaigns.predicted --read FOLDER    the table from an earlier run

`--frameworks NAME,..` measures only these. A machine drifts by more than the model may be wrong: so
the grid runs ahead of a profile and, in the reverse order, behind it. Each further one of
`--rounds N` adds a profile and a grid, 15 min; what counts is the mean of the rounds:

    grid 0    profile 0    grid 1 (backwards)    profile 1    grid 2    ...
    └──────── round 0 ──────────┘
                           └────────────── round 1 ──────────────┘
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli.numbers import positive
from common.harness.bench import run_name
from common.harness.launch import IMPLEMENTATIONS, ORACLE_MODULE, run_jobs_in_worker
from common.harness.profile import Profile, profile
from common.io.usage import UsageError, chosen
from common.report.compare import oracle_config, parity
from common.report.grid import Grid
from common.report.machine import this_machine
from common.report.result import RunResult, measured
from common.runtime.job import Job
from common.spec.plan import Plan, plan_one
from common.spec.run import FRAMEWORKS, RunConfig, preset
from common.spec.unit_times import counted_times
from tests.campaigns.make_schedules import fill

PAGE = Path("docs/planning.md")
COUNTS = (4, 8)
SCHEDULES = {
    1: {"1f1b": 1, "zb-h1": 1, "interleaved": 2},
    2: {
        **{"gpipe": 1, "1f1b": 1, "zb-h1": 1, "zb-h2": 1},
        **{"interleaved": 2, "interleaved-zb": 2, "zb-v": 2},
    },
}
"""By p: each with its v. On one device most are the same row of F and BW."""
STEPS, UNTIMED_STEPS = 7, 2
GOAL = 0.05


@dataclass(frozen=True)
class Cell:
    """One place of the grid in one framework; times in seconds."""

    config: RunConfig
    predictions: tuple[float, ...]
    """From the profile of every round."""
    measured: tuple[float, ...]
    """Medians of its runs, one more than there are rounds."""

    @property
    def predicted(self) -> float:
        return statistics.mean(self.predictions)

    @property
    def middle(self) -> float:
        """The mean of the rounds: what lies between two profiles is of two of them."""
        return statistics.mean(map(statistics.mean, itertools.pairwise(self.measured)))

    @property
    def error(self) -> float:
        return self.predicted / self.middle - 1

    @property
    def spread(self) -> float:
        """How far two runs of the same cell lie apart, one behind the other."""
        pairs = itertools.pairwise(self.measured)
        return statistics.median(max(pair) / min(pair) - 1 for pair in pairs)


def grid(framework: str, stages: int) -> list[RunConfig]:
    """Return the runs on so many stages, each cut by counted FLOPs."""
    base = preset("small").model_copy(update={"framework": framework, "device": "cpu"})
    found = []
    for name, v in SCHEDULES[stages].items():
        for m in COUNTS:
            train = {"micro_batches": m, "steps": STEPS, "warmup_steps": 0}
            run = {"stages": stages, "schedule": name, "chunks": v}
            run |= {"train": base.train.model_copy(update=train)}
            config = RunConfig.model_validate(dict(base) | run)
            plan = plan_one(config, counted_times(config, 1e12), float("inf"))
            assert isinstance(plan, Plan)
            found.append(plan.config)
    return found


def measure(framework: str, out: Path, oracle: tuple[RunResult, Path], rounds: int) -> None:
    """Keep a result for every run of the grid, and the profiles between them."""
    folder = out / framework
    both = [grid(framework, stages) for stages in SCHEDULES]
    for number in range(rounds + 1):
        if number:
            made = profile(both[-1][0], max(SCHEDULES))
            made.write(folder / f"profile-{number - 1}.json")
        step = -1 if number % 2 else 1
        for configs in both[::step]:
            run(configs[::step], folder, oracle, number)


def run(
    configs: Sequence[RunConfig], folder: Path, oracle: tuple[RunResult, Path], repeat: int
) -> None:
    """Run them in one worker process and keep their results."""
    with tempfile.TemporaryDirectory(prefix="triptych-") as name:
        jobs = [Job(config=c, out=str(Path(name) / str(i))) for i, c in enumerate(configs)]
        module = IMPLEMENTATIONS[configs[0].framework].module
        outcomes = run_jobs_in_worker(module, jobs, Path(name))
        for job, outcome in zip(jobs, outcomes, strict=True):
            result = RunResult(
                **measured(outcome, job.config, UNTIMED_STEPS),
                preset="small",
                repeat=repeat,
                config=job.config,
                command="python -m tests.campaigns.predicted",
                machine=this_machine(),
            )
            if result.status == "ok":
                verdict = parity(result, Path(job.out), *oracle)
                result = result.model_copy(update={"parity": verdict})
            print(f"{run_name(job.config, repeat)}: {result.parity.status} {result.reason}")
            kept = folder / run_name(job.config, repeat)
            kept.mkdir(parents=True, exist_ok=True)
            result.write(kept / "result.json")


def run_oracle(config: RunConfig, folder: Path) -> tuple[RunResult, Path]:
    """Run what all cells are compared with."""
    right = oracle_config(config)
    job = Job(config=right, out=str(folder / "oracle"), in_one_process=True)
    (outcome,) = run_jobs_in_worker(ORACLE_MODULE, [job], folder)
    if outcome.status != "ok":
        raise SystemExit(f"the oracle failed: {outcome.reason}")
    known = measured(outcome, right, UNTIMED_STEPS)
    machine, command = this_machine(), "python -m tests.campaigns.predicted"
    result = RunResult(**known, preset="small", config=right, command=command, machine=machine)
    return result, folder / "oracle"


def read(folder: Path) -> dict[str, list[Cell]]:
    """Return the cells of every framework that was measured, those that passed parity."""
    found: dict[str, list[Cell]] = {}
    for framework in FRAMEWORKS:
        rounds = len([*(folder / framework).glob("profile-*.json")])
        profiles = [
            Profile.read(folder / framework / f"profile-{number}.json") for number in range(rounds)
        ]
        seconds: dict[RunConfig, dict[int, float]] = {}
        for each in (folder / framework).glob("*/result.json"):
            result = RunResult.read(each)
            if result.parity.status == "pass":
                middle = statistics.median(result.steady_seconds)
                seconds.setdefault(result.config, {})[result.repeat] = middle
        cells = [
            Cell(
                config,
                tuple(_predicted(config, each) for each in profiles),
                tuple(steps[repeat] for repeat in sorted(steps)),
            )
            for config, steps in seconds.items()
            if len(steps) == len(profiles) + 1
        ]
        if cells:
            found[framework] = cells
    return found


def _predicted(config: RunConfig, made: Profile) -> float:
    plan = plan_one(config, made.times, float("inf"))
    assert isinstance(plan, Plan)
    return plan.step_seconds


def table(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Return the grid, a row for each cell, and what follows from it."""
    place = {
        framework: {_place(cell.config): cell for cell in own} for framework, own in cells.items()
    }
    rows = []
    for stages, names in SCHEDULES.items():
        for name, v in names.items():
            for m in COUNTS:
                at = stages, name, v, m
                seen = [_text(place[framework].get(at)) for framework in cells]
                rows.append([str(stages), name, str(v), str(m), *seen])
    titles = ("p", "schedule", "v", "m", *(f"{framework}, ms" for framework in cells))
    words = [summary(framework, own) for framework, own in cells.items()]
    lines = [line for each in words for line in textwrap.wrap(f"- {each}", 120)]
    return "\n".join([Grid(titles, rows, ("schedule",)).markdown(), *lines])


def _place(config: RunConfig) -> tuple[int, str, int, int]:
    return config.stages, config.schedule, config.chunks, config.train.micro_batches


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "failed"
    return f"{1e3 * cell.predicted:.0f} / {1e3 * cell.middle:.0f} ({cell.error:+.1%})"


def summary(framework: str, cells: Sequence[Cell]) -> str:
    """Say how wrong the model is, how much of it is the machine, and what the best plan costs."""
    errors, spreads = [cell.error for cell in cells], [cell.spread for cell in cells]
    best = min(cells, key=lambda cell: cell.predicted)
    regret = best.middle / min(cell.middle for cell in cells) - 1
    p, name, v, m = _place(best.config)
    return (
        f"{framework}: {sum(abs(error) <= GOAL for error in errors)} of {len(errors)} cells are "
        f"within {GOAL:.0%}; the error is {statistics.median(map(abs, errors)):.1%} in the median, "
        f"{statistics.mean(errors):+.1%} in the mean and {max(errors, key=abs):+.1%} at worst; "
        f"two runs of a cell in a row differ by {statistics.median(spreads):.1%} in the median and "
        f"{max(spreads):.1%} at most. The plan called best, {name} with "
        f"p = {p}, v = {v}, m = {m}, takes {regret:.1%} longer than the fastest."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FOLDER")
    action.add_argument("--read", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N")
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), metavar="NAME,..")
    arguments = parser.parse_args(argv)
    folder = arguments.out or arguments.read
    try:
        frameworks = chosen(arguments.frameworks, FRAMEWORKS, "--frameworks")
    except UsageError as error:
        parser.error(str(error))
    if arguments.out:
        with tempfile.TemporaryDirectory(prefix="triptych-") as name:
            oracle = run_oracle(grid(FRAMEWORKS[0], max(SCHEDULES))[0], Path(name))
            for framework in frameworks:
                measure(framework, folder, oracle, arguments.rounds)
    try:
        found = read(folder)
    except UsageError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{folder}: holds no cells; expected a folder of an earlier --out")
    made = table(found)
    print(made)
    fill("predicted", f"{made}\n\n{this_machine().one_line}.", PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
