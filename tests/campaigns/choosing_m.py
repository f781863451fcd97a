"""How many micro-batches? The tables and the picture of docs/choosing-m.md.

    python -m tests.campaigns.choosing_m                     the tables that need no measuring
    python -m tests.campaigns.choosing_m --measure FOLDER    deep48 in all frameworks too, 15 min
    python -m tests.campaigns.choosing_m --read FOLDER       that part from an earlier run
    python -m tests.campaigns.choosing_m --profile FOLDER    the same with new profiles, 5 min

`--frameworks NAME ...` measures only these.

Run it in the repository's root, with nothing else running. A stage wants a core to itself: so many
stages are measured as there are cores, 4 at most.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.cli.main import main as triptych
from common.harness.profile import Profile, profile
from common.io.figure import new_figure
from common.io.usage import UsageError
from common.report.collect import collect
from common.report.grid import Grid
from common.runtime.cpus import usable_cpus
from common.schedule.action import Op
from common.schedule.generators import make_schedule
from common.schedule.occupancy import occupancy
from common.spec.plan import Plan, plan_one
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec, preset
from common.spec.unit_times import UnitTimes
from tests.campaigns.make_schedules import fill

PAGE = Path("docs/choosing-m.md")
PICTURE = Path("docs/images/choosing-m.png")
STAGES, BATCH, COUNTS = 4, 64, (4, 8, 12, 16, 20)
GB_AT_4 = 2.0
"""The textbook's: a micro-batch of 16 sequences on stage 0 holds 2 GB."""
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h2": 1}


def peak_gb(name: str, m: int, fixed_batch: bool) -> float:
    """Stage 0's activations at their fullest, played by the schedule."""
    schedule = make_schedule(name, STAGES, m, SCHEDULES[name])
    fixed = TrainSpec(batch_size=BATCH, micro_batches=m).micro_batch_sizes
    sizes = fixed if fixed_batch else [BATCH // 4] * m
    kinds = sorted(set(sizes))
    counts = occupancy(schedule, [kinds.index(size) for size in sizes])[0]
    gb = [GB_AT_4 * size / (BATCH // 4) / SCHEDULES[name] for size in kinds]
    return float((counts[..., 0].sum(axis=1) @ gb).max())


def memory_table() -> str:
    rows = []
    for fixed, words in ((False, "every micro-batch 16 sequences"), (True, "64 sequences in all")):
        for name in SCHEDULES:
            cells = [f"{peak_gb(name, m, fixed):.1f}" for m in COUNTS]
            rows.append([f"{name}, {words}", *cells])
    return table("GB on stage 0", (), rows)


def table(title: str, more: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a column for every m, and `more`."""
    titles = (title, *(f"m = {m}" for m in COUNTS), *more)
    return Grid(titles, rows, [title]).markdown().strip()


def deep(framework: str, stages: int, m: int) -> RunConfig:
    base = preset("deep48")
    train = base.train.model_copy(update={"batch_size": BATCH, "micro_batches": m})
    run = {"framework": framework, "schedule": "1f1b", "stages": stages, "device": "cpu"}
    return base.model_copy(update=run | {"train": train})


def measure_units(folder: Path, frameworks: Sequence[str]) -> None:
    """Keep a profile of deep48 for every framework."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = min(STAGES, usable_cpus())
    for framework in frameworks:
        made = profile(deep(framework, stages, COUNTS[0]), stages, with_fewer=False)
        made.write(folder / f"profile-{framework}.json")


def measure_steps(folder: Path, frameworks: Sequence[str]) -> None:
    """Keep a benchmark of deep48."""
    stages = min(STAGES, usable_cpus())
    options = ["--preset", "deep48", "--batch-size", str(BATCH), "--schedules", "1f1b"]
    options += ["--device", "cpu", "--frameworks", ",".join(frameworks)]
    options += ["--stages", str(stages), "--out", str(folder / "bench")]
    triptych(["bench", *options, "--micro-batches", ",".join(map(str, COUNTS))])


def fixed_cost(times: UnitTimes, stages: int) -> float:
    """What a micro-batch costs a stage by itself, in sequences: `a` in m* = sqrt(B (p-1) / a)."""
    part = ["block.0"] * (preset("deep48").model.num_layers // stages)
    at = {b: times.of_part(part, Op.F, b) + times.of_part(part, Op.BW, b) for b in (4, 16)}
    slope = (at[16] - at[4]) / 12
    return max(0.0, (at[4] - 4 * slope) / slope)


def measured_steps(folder: Path) -> dict[tuple[str, int], float]:
    """Median steps in seconds, by framework and m, of runs that passed parity."""
    found: dict[tuple[str, int], list[float]] = {}
    for result in collect(sorted((folder / "bench").iterdir())).results:
        if result.parity.status == "pass":
            key = result.config.framework, result.config.train.micro_batches
            found.setdefault(key, []).extend(result.steady_seconds)
    return {key: statistics.median(steps) for key, steps in found.items()}


def knee_table(profiles: Mapping[str, Profile], steps: Mapping[tuple[str, int], float]) -> str:
    rows = []
    for framework, kept in profiles.items():
        cells = []
        for m in COUNTS:
            seconds, measured = predicted(kept, framework, m), steps.get((framework, m))
            text = "-" if measured is None else f"{1e3 * measured:,.0f}"
            cells.append(f"{1e3 * seconds:,.0f} / {text}")
        a = fixed_cost(kept.times, kept.devices)
        best = "any" if a == 0 else f"{(BATCH * (kept.devices - 1) / a) ** 0.5:.0f}"
        rows.append([f"{framework}, p = {kept.devices}", *cells, f"{a:.1f}", best])
    return table("step ms, predicted / measured", ("a", "m*"), rows)


def predicted(kept: Profile, framework: str, m: int) -> float:
    plan = plan_one(deep(framework, kept.devices, m), kept.times, float("inf"))
    assert isinstance(plan, Plan)
    return plan.step_seconds


def picture(profiles: Mapping[str, Profile], steps: Mapping[tuple[str, int], float]) -> None:
    """Memory against m; and throughput, where it has been measured."""
    figure = new_figure(10 if profiles else 6, 3.6)
    left, *others = figure.subplots(1, 2 if profiles else 1, squeeze=False)[0]
    for color, name in enumerate(SCHEDULES):
        for fixed, dash in ((False, "--"), (True, "-")):
            gb = [peak_gb(name, m, fixed) for m in COUNTS]
            words = f"{name}, {'64 sequences in all' if fixed else '16 in a micro-batch'}"
            left.plot(COUNTS, gb, dash, color=f"C{color}", label=words)
    left.set_ylabel("GB on stage 0")
    for right, (framework, kept) in itertools.product(others, profiles.items()):
        speed = [BATCH / predicted(kept, framework, m) for m in COUNTS]
        (line,) = right.plot(COUNTS, speed, "--")
        known = [m for m in COUNTS if (framework, m) in steps]
        seen = [BATCH / steps[framework, m] for m in known]
        right.plot(known, seen, "o-", color=line.get_color(), label=framework)
        right.set_ylabel("sequences/s (dashed: predicted)")
    for axes in (left, *others):
        axes.set_xlabel("micro-batches m")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(PICTURE, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=Path, metavar="FOLDER")
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    arguments = parser.parse_args(argv)
    fill("memory", memory_table(), PAGE)
    folder, frameworks = arguments.measure or arguments.profile, arguments.frameworks
    if folder:
        measure_units(folder, frameworks)
    if arguments.measure:
        measure_steps(folder, frameworks)
    folder = folder or arguments.read
    profiles: dict[str, Profile] = {}
    steps: dict[tuple[str, int], float] = {}
    if folder:
        known = {framework: folder / f"profile-{framework}.json" for framework in FRAMEWORKS}
        try:
            profiles = {name: Profile.read(path) for name, path in known.items() if path.exists()}
        except UsageError as error:
            parser.error(str(error))
        steps = measured_steps(folder)
        machines = "; ".join(dict.fromkeys(kept.machine for kept in profiles.values()))
        fill("knee", f"{knee_table(profiles, steps)}\n\n{machines}.", PAGE)
    picture(profiles, steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
