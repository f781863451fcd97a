"""Which schedule is fastest with four stages, on two cores? Each stage gets half of a core.

    python -m tests.campaigns.half_cores --out FOLDER     as root, with nothing else running; 15 min

Four stages on two cores take turns, and no bubble can be seen: where one waits, another computes.
So each is a process (as over hosts, by TF_CONFIG) whose share of the CPU the kernel limits: 1 ms of
every 2 ms (cgroups, CPU bandwidth control). That makes four slow devices of their own. They start
with all cores, since no statistic includes the first steps.

The share is that of four times a plain loop on one such device. Makes a table of docs/schedules.md
of the runs in FOLDER; what is there already is not measured again. A run counts only if its losses
are, bit for bit, those of a benchmark that passed parity.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from common.cli.main import main as triptych
from common.harness.launch import IMPLEMENTATIONS
from common.report.grid import Grid
from common.report.result import RunResult
from common.schedule.generators import make_schedule
from common.schedule.simulate import simulate
from common.spec.run import FRAMEWORKS
from tests.campaigns.make_schedules import PAGE, fill
from tests.hosts import ROOT

STAGES, MICRO_BATCHES, PERIOD_MICROSECONDS = 4, 8, 2000
SCHEDULES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "interleaved-overlap": 2,
    "interleaved-zb": 2,
    "zb-h1": 1,
    "zb-h2": 1,
    "zb-v": 2,
    "v-half": 2,
    "dualpipev": 2,
}
"""With their chunks for each device."""
PLAIN, BENCH = "plain", "passed"


class HalfCore:
    """A group of processes that together have half a core's time, of cgroups 1 or 2."""

    def __init__(self, name: str) -> None:
        root = Path("/sys/fs/cgroup")
        first = (root / "cpu").is_dir()
        self._folder = (root / "cpu" if first else root) / name
        self._folder.mkdir(exist_ok=True)
        half = PERIOD_MICROSECONDS // 2
        if first:
            (self._folder / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (self._folder / "cpu.cfs_quota_us").write_text(str(half))
        else:
            (self._folder / "cpu.max").write_text(f"{half} {PERIOD_MICROSECONDS}")

    def take(self, pid: int) -> None:
        """Take a process and those that it has started."""
        # One that has ended is gone, and its status tells why.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                (self._folder / "cgroup.procs").write_text(str(each.pid))

    def close(self) -> None:
        self._folder.rmdir()


@contextlib.contextmanager
def half_cores() -> Iterator[list[HalfCore]]:
    cores = [HalfCore(f"half-core-{number}") for number in range(STAGES)]
    try:
        yield cores
    finally:
        for core in cores:
            core.close()


def train(out: Path, framework: str, words: list[str], cores: list[HalfCore]) -> None:
    """Train with a process for each core, unless `out` is there."""
    if out.exists():
        return
    print(out, flush=True)
    out.mkdir(parents=True)
    module = IMPLEMENTATIONS[framework].module
    command = [sys.executable, "-m", module, "train", *words, "--out", str(out)]
    workers = [f"127.0.0.1:{7100 + number}" for number in range(len(cores))]
    started = []
    for number in range(len(cores)):
        task = {"type": "worker", "index": number}
        config = json.dumps({"cluster": {"worker": workers}, "task": task})
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": config}
        with (out / f"log-{number}").open("wb") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=out))
    while started[0].poll() is None and not any(
        file.stat().st_size for file in out.glob("*/*/progress.jsonl")
    ):
        time.sleep(0.05)  # until the first step is done
    for core, process in zip(cores, started, strict=True):
        core.take(process.pid)
    if any([process.wait() for process in started]):  # noqa: C419  wait for all of them
        out.rename(out.with_name(f"failed-{out.name}"))
        raise SystemExit(f"{out.name} failed: see failed-{out.name}")


def measure(folder: Path, preset: str, frameworks: Sequence[str]) -> None:
    run = ["--preset", preset, "--device", "cpu", "--steps", "9", "--partition", "balanced"]
    several = ["--stages", str(STAGES), "--micro-batches", str(MICRO_BATCHES)]
    for framework in frameworks:
        home = folder / framework
        if not (home / BENCH).exists():
            options = ["--frameworks", framework, "--schedules", "1f1b", *several]
            triptych(["bench", *run, *options, "--repeats", "1", "--out", str(home / BENCH)])
        with half_cores() as cores:
            plain = ["--schedule", "gpipe", "--stages", "1", "--micro-batches", "1"]
            train(home / PLAIN, framework, [*run, *plain, "--threads", "1"], cores[:1])
            for name, chunks in SCHEDULES.items():
                words = ["--schedule", name, "--chunks", str(chunks), *several]
                train(home / name, framework, [*run, *words, "--threads", str(STAGES)], cores)


def page(folder: Path) -> str:
    """Return the table, what is the fastest, and what was measured."""
    frameworks = [each for each in FRAMEWORKS if (folder / each).is_dir()]
    shares = {(f, name): share(folder / f, name) for f in frameworks for name in SCHEDULES}
    best = {f: max(SCHEDULES, key=lambda name: shares[f, name][0]) for f in frameworks}
    rows = []
    for name, chunks in SCHEDULES.items():
        busy = 1 - simulate(make_schedule(name, STAGES, MICRO_BATCHES, chunks)).bubble_fraction
        cells = [
            f"{'**' * (best[f] == name)}{shares[f, name][0]:.2f}{'**' * (best[f] == name)} / "
            f"{shares[f, name][1]:.2f}"
            for f in frameworks
        ]
        rows.append([name, str(chunks), f"{busy:.2f}", *cells])
    titles = ("schedule", "v", "F = B = W", *frameworks)
    fastest = "; ".join(f"{f} {name}, {shares[f, name][0]:.2f}" for f, name in best.items())
    first = result_of(folder / frameworks[0] / "1f1b")
    legend = (
        f"Fastest: {fastest}. Tokens per second over four times those of a plain loop on one such "
        "device, measured / simulated from the run's own costs; beside them the busy share at F = "
        f"B = W. p = {STAGES}, m = {MICRO_BATCHES}, {first.config.train.batch_size} sequences, "
        f"{first.config.model.num_layers} blocks of width {first.config.model.d_model}, each stage "
        f"half of a core, losses equal to a run that passed parity. {first.machine.one_line}."
    )
    return "\n".join([Grid(titles, rows, ["schedule"]).markdown(), *textwrap.wrap(legend, 120)])


def share(home: Path, name: str) -> tuple[float, float]:
    """Return the speed over four plain loops on one device each: measured, and simulated."""
    (passed,) = (run for run in results(home / BENCH) if not run.is_oracle)
    plain, here = result_of(home / PLAIN), result_of(home / name)
    if passed.parity.status != "pass":
        raise SystemExit(f"{home / BENCH}: did not pass parity")
    if [step.loss for step in here.steps] != [step.loss for step in passed.steps]:
        raise SystemExit(f"{home / name}: its losses are not those of {BENCH}")
    assert plain.tokens_per_second and here.tokens_per_second and here.timing
    measured = here.tokens_per_second / (STAGES * plain.tokens_per_second)
    return measured, measured / (1 + here.timing.step_difference)


def results(folder: Path) -> list[RunResult]:
    return [RunResult.read(path) for path in sorted(folder.glob("*/*/result.json"))]


def result_of(folder: Path) -> RunResult:
    (result,) = results(folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/schedules.md")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    measure(folder, arguments.preset, arguments.frameworks)
    made = page(folder)
    print(made)
    fill("half-cores", made, arguments.page)


if __name__ == "__main__":
    main()
