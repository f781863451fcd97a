"""The benchmark: oracle, runs, comparison, table. `bench_all.py` and `triptych bench` are this."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from common.harness.launch import (
    IMPLEMENTATIONS,
    ORACLE_MODULE,
    ROUNDED_ORACLE_MODULE,
    Implementation,
    Interrupted,
    run_jobs_in_worker,
    stop_on_signals,
    why_missing,
)
from common.harness.options import Bench
from common.harness.peak import Probe, peak_of
from common.io.console import say
from common.io.edges import printable
from common.io.usage import UsageError
from common.report import compare, tables
from common.report.collect import collect
from common.report.facts import fallbacks, parity_verdict
from common.report.grid import Grid
from common.report.machine import Machine, git_commit, this_machine
from common.report.names import framework_name, shards_word, variant_of
from common.report.progress import PlainProgress, progress_view
from common.report.result import IS_ORACLE, Parity, Peak, RunResult, measured
from common.runtime.job import Job
from common.runtime.outcome import Outcome
from common.runtime.text import Texts
from common.schedule.action import ScheduleError
from common.schedule.draw import draw_color
from common.schedule.generators import make_schedule
from common.spec.partition import plan_partition, schedule_of, unit_costs
from common.spec.run import RunConfig

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130

ORACLE_NAME = "oracle (NumPy float64)"


def run_bench(
    bench: Bench,
    command: str,
    console: Console,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> int:
    """Run everything, write `results/<run>/`, print the table. Raises UsageError."""
    folder = make_folder(Path(bench.options.out), bench.options.preset)
    compared = [point for point in bench.points if not compare.why_not_comparable(point)]
    compared = compared if bench.options.parity else []
    # Most rows share an oracle: framework, partition and schedule do not change the numbers.
    oracles = list(dict.fromkeys(map(compare.oracle_config, compared)))
    oracles += list(dict.fromkeys(filter(None, map(compare.rounded_oracle_config, compared))))
    say(console, f"results in {folder}/")
    runs = len(bench.points) * bench.options.repeats
    with stop_on_signals() as stopped:
        with progress_view(console, len(oracles) + runs) as view:
            session = _Session(bench, command, folder, implementations, view, stopped)
            try:
                for config in oracles:
                    session.run_oracle(config)
                for repeat in range(bench.options.repeats):
                    # There and back again: a machine that slows down steadily slows all alike.
                    for config in bench.points if repeat % 2 == 0 else reversed(bench.points):
                        session.run(config, repeat)
                interrupted = False
            except Interrupted:
                interrupted = True
        session.clean_up()
        failed = _report(session, console)
    if interrupted:
        done = sum(len(results) for results in session.results.values())
        console.print(f"interrupted: {done} of {runs} runs finished")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if failed else EXIT_OK


def make_folder(out: Path, preset: str) -> Path:
    """Make a new folder named after the time and the preset. Raises UsageError."""
    name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{preset}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (out / (name + suffix)).mkdir(parents=True)
            return out / (name + suffix)
        except FileExistsError:
            if not out.is_dir():
                raise UsageError(f"--out {out}: is a file; expected a folder") from None
        except OSError as error:
            reason = f"{error.strerror}; expected a folder that can be written"
            raise UsageError(f"--out {out}: {reason}") from None
    raise UsageError(f"--out {out}: holds 99 runs of this second; use another folder")


def run_name(config: RunConfig, repeat: int | None = None) -> str:
    """Return the run's folder name: framework, schedule, and what distinguishes it in its grid."""
    # A schedule file's name may be of any length; a folder's may not.
    schedule = printable(Path(config.schedule.removeprefix("file:")).stem, 48)
    framework = framework_name(config).replace("/", "-")
    name = f"{framework}-{schedule}-p{config.stages}-m{config.train.micro_batches}"
    name += f"-v{config.chunks}" if config.chunks > 1 else ""
    name += f"-d{config.replicas}" if config.replicas > 1 else ""
    name += f"-{shards}" if (shards := shards_word(config).replace("=", "")) else ""
    name += f"-{config.executor}" if config.executor != "table" else ""
    name = "-".join([name, *(re.sub("[=:]", "-", word) for word in variant_of(config))])
    return name if repeat is None else f"{name}-r{repeat}"


def describe(config: RunConfig) -> str:
    """Describe the run in words, for the progress bar."""
    chunks = f" v={config.chunks}" if config.chunks > 1 else ""
    executor = f" {config.executor}" if config.executor != "table" else ""
    replicas = f" d={config.replicas}" if config.replicas > 1 else ""
    shards = f" {word}" if (word := shards_word(config)) else ""
    size = f"p={config.stages}{chunks}{replicas}{shards} m={config.train.micro_batches}"
    name = f"{framework_name(config)} {config.schedule_name}{executor} {size}"
    return " ".join([name, *variant_of(config)])


@dataclass
class _Session:
    """The state of one benchmark while it runs."""

    bench: Bench
    command: str
    folder: Path
    implementations: Mapping[str, Implementation]
    view: PlainProgress
    stopped: Callable[[], bool]
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    machine: Machine = field(default_factory=this_machine)
    commit: str | None = field(default_factory=git_commit)
    results: dict[RunConfig, list[RunResult]] = field(default_factory=dict)
    oracles: dict[RunConfig, tuple[RunResult, Path]] = field(default_factory=dict)
    peaks: dict[tuple[int, Probe], tuple[float | None, str]] = field(default_factory=dict)
    """By repeat: the machine may slow down, and its peak with it."""

    def __post_init__(self) -> None:
        self.texts = Texts(self.folder)

    def run_oracle(self, config: RunConfig) -> None:
        name = "oracle" if not self.oracles else f"oracle-{len(self.oracles) + 1}"
        module, label = ORACLE_MODULE, ORACLE_NAME
        if config.train.dtype == "bfloat16":
            module, label = ROUNDED_ORACLE_MODULE, f"{ORACLE_NAME}, weights rounded to bfloat16"
        if config.compress != "none":
            label += f", compress={config.compress}"
        self.view.start(label, config.train.steps)
        from common.runtime import oracle_worker

        needed, free = oracle_worker.memory_bytes(config), psutil.virtual_memory().available
        if needed < free:
            outcome = self._worker(module, config, name)
        else:
            (self.folder / name).mkdir()
            reason = f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
            outcome = Outcome("skipped", reason, None, (), 0.0)
        result = self._result(config, outcome, 0, name)
        self.oracles[config] = result, self.folder / name
        self.view.finish(f"{label}: {_summary(result)}")

    def run(self, config: RunConfig, repeat: int) -> None:
        name = run_name(config, repeat if self.bench.options.repeats > 1 else None)
        while (self.folder / name).exists():  # two schedule files of one name
            name += "-other"
        self.view.start(describe(config), config.train.steps)
        implementation = self.implementations[config.framework]
        missing = why_missing(implementation, config.executor, config.python)
        if missing is None:
            outcome = self._worker(implementation.module, config, name)
        else:
            (self.folder / name).mkdir()
            outcome = Outcome("skipped", missing, None, (), 0.0)
        result = self._result(config, outcome, repeat, name)
        self.results.setdefault(config, []).append(result)
        self.view.finish(f"{describe(config)}: {_summary(result)}")

    def clean_up(self) -> None:
        """Remove the oracles' tensors and the tokens: both are large."""
        for _, folder in self.oracles.values():
            _drop_tensors(folder)
        self.texts.drop()

    def _worker(self, module: str, config: RunConfig, name: str) -> Outcome:
        if self.stopped():
            raise Interrupted
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        of_oracle = module in (ORACLE_MODULE, ROUNDED_ORACLE_MODULE)
        out, text = str(self.folder / name), self.texts.of(config)
        return run_jobs_in_worker(
            module,
            [Job(config=config, out=out, text=text, in_one_process=of_oracle)],
            self.folder / name,
            self.bench.options.timeout or math.inf,
            on_step=lambda _, step, loss: self.view.step(step, loss),
            stopped=self.stopped,
            log=logs / f"{name}.log",
        )[0]

    def _result(self, config: RunConfig, outcome: Outcome, repeat: int, name: str) -> RunResult:
        known = measured(outcome, config, self.bench.options.untimed_steps)
        result = RunResult(
            **known,
            peak=self._peak(config, known.get("environment", {}), repeat),
            log=None if outcome.log is None else str(outcome.log.relative_to(self.folder)),
            preset=self.bench.options.preset,
            row=self.bench.points.index(config) if config in self.bench.points else 0,
            repeat=repeat,
            config=config,
            command=self.command,
            machine=self.machine,
            git_commit=self.commit,
            started=self.started.isoformat(timespec="seconds"),
        )
        if name.startswith("oracle"):
            verdict = Parity(reason=IS_ORACLE)
        else:
            verdict = self._parity(result, self.folder / name)
            if verdict.status != "FAIL":
                _drop_tensors(self.folder / name)
        result = result.model_copy(update={"parity": verdict})
        result.write(self.folder / name / "result.json")
        return result

    def _peak(self, config: RunConfig, environment: Mapping[str, Any], repeat: int) -> Peak | None:
        probe = None if self.stopped() else Probe.of_run(config, environment)
        if probe is None:
            return None
        if (repeat, probe) not in self.peaks:
            self.peaks[repeat, probe] = probe.measure()
        return peak_of(probe, self.peaks[repeat, probe], environment)

    def _parity(self, result: RunResult, folder: Path) -> Parity:
        if result.status != "ok":
            how = "has failed" if result.status == "failed" else "was skipped"
            return Parity(reason=f"the run {how}")
        if reason := compare.why_not_comparable(result.config):
            return Parity(status="not comparable", reason=reason)
        oracle, oracle_folder = self.oracles.get(compare.oracle_config(result.config), (None, None))
        if oracle is None or oracle_folder is None:
            return Parity(reason="--no-parity")
        if oracle.status != "ok":
            return Parity(reason=f"the oracle {oracle.status}: {oracle.reason}")
        rounded_config = compare.rounded_oracle_config(result.config)
        found = self.oracles.get(rounded_config) if rounded_config else None
        try:
            return compare.parity(result, folder, oracle, oracle_folder, *(found or ()))
        except (ValueError, OSError) as error:  # a worker that leaves other files than it should
            return Parity(status="FAIL", reason=f"cannot be compared: {error}")


def _drop_tensors(folder: Path) -> None:
    for path in folder.rglob("part-*.safetensors"):
        path.unlink()


def _summary(result: RunResult) -> str:
    if result.status != "ok":
        return f"{result.status}: {result.reason}"
    words = ["ok", f"loss {result.final_loss:.5f}"]
    if not result.is_oracle:
        words.insert(1, f"parity {result.parity.status}")
        words += [f"{result.tokens_per_second:,.0f} tokens/s"] if result.tokens_per_second else []
    return ", ".join([*words, f"{result.wall_seconds:.0f} s"])


# ------------------------------------------------------------------------------- what the user sees


def _report(session: _Session, console: Console) -> bool:
    """Print the tables and what went wrong, write the report, and return whether anything failed.

    A run that did not end well, one that trained something else, and a failed oracle count.
    """
    if not session.results:
        return any(result.status == "failed" for result, _ in session.oracles.values())
    collection = collect([session.folder])
    console.print()
    dropped = False
    several = tables.by_track(collection.rows)
    for track, rows in several.items():
        if len(several) > 1:
            console.print(f"track {track}", style="bold")
        dropped |= tables.print_table(rows, console)
        console.print()
    for line in collection.problems:
        say(console, line)
    say(console, parity_verdict(collection).text)
    for line in fallbacks(collection.results):
        say(console, line)
    if dropped:
        console.print("This terminal is too narrow for all columns.")
    from common.report.publish import publish  # imported here, with all that draws

    publish(collection, session.folder, session.bench.options.sweep)
    say(console, f"report: {session.folder / 'report.html'}")
    results = [*collection.results, *(run.result for run in collection.oracles)]
    return any(result.status == "failed" or result.parity.status == "FAIL" for result in results)


# ------------------------------------------------------------------------------------------ dry run


def print_dry_run(bench: Bench, console: Console) -> None:
    """Print every distinct partition plan and every distinct schedule of the grid."""
    plans = {
        (c.model, c.partition, c.train.dtype, _sizes(c), plan_partition(c), tuple(_devices(c))): c
        for c in bench.points
    }
    for config in plans.values():
        console.print(_plan_table(config))
        console.print()
    say(
        console,
        "MB: parameters alone; forward MFLOP and what a stage sends on are for the first "
        "micro-batch\n",
    )
    schedules = {(c.schedule, c.stages, c.train.micro_batches, c.chunks) for c in bench.points}
    for name, stages, micro_batches, chunks in sorted(schedules):
        console.print(
            f"{name}, {stages} stages, {micro_batches} micro-batches", style="bold", highlight=False
        )
        try:
            schedule = make_schedule(name, stages, micro_batches, chunks)
            console.print(draw_color(schedule, None, console.width, console.options.ascii_only))
        except ScheduleError as error:
            say(console, f"not drawn: {error}\n")
    repeats = f" x {bench.options.repeats} repeats" if bench.options.repeats > 1 else ""
    say(console, f"runs ({len(bench.points)}{repeats}):")
    for config in bench.points:
        say(console, f"  {describe(config)}")


def _sizes(config: RunConfig) -> str:
    """Return the sequences in a micro-batch: `4`, or `6 or 5` if they differ."""
    return " or ".join(map(str, sorted(set(config.micro_batch_sizes), reverse=True)))


def _devices(config: RunConfig) -> list[int]:
    """The device of every virtual stage."""
    return [device for device, _ in schedule_of(config).location]


def _plan_table(config: RunConfig) -> Table:
    costs = {cost.unit: cost for cost in unit_costs(config.model, config.train)}
    element_bytes = 8 if config.train.master_dtype == "float64" else 4
    total = sum(cost.forward_flops for cost in costs.values())
    parts = plan_partition(config).parts
    given = config.partition
    partition = given if isinstance(given, str) else ",".join(map(str, given))
    flops = [sum(costs[unit].forward_flops for unit in units) for units in parts]
    devices = _devices(config)
    loads = [0.0] * config.stages
    for device, count in zip(devices, flops, strict=True):
        loads[device] += count
    rows = []
    for k, units in enumerate(parts):
        parameters = sum(costs[unit].parameters for unit in units)
        sends = costs[units[-1]].activation_bytes / 1e3 if k + 1 < len(parts) else 0
        size = [f"{parameters:,}", f"{parameters * element_bytes / 1e6:,.1f}"]
        work = [f"{flops[k] / 1e6:,.1f}", f"{flops[k] / total:.1%}", f"{sends:,.1f}"]
        rows.append([str(devices[k]), shorten(units), *size, *work])
    titles = ("stage", "units", "parameters", "MB", "forward MFLOP", "share", "sends kB")
    table = Grid(titles, rows, ("units",)).rich()
    table.columns[1].no_wrap = False
    alike = len(parts) == config.stages * config.chunks  # else a file has placed them
    chunks = f" of {config.chunks} chunks" if alike else f", {len(parts)} chunks"
    chunks = chunks if config.chunks > 1 else ""
    sizes = f"micro-batches of {_sizes(config)} sequences"
    table.title = f"{config.stages} stages{chunks}, partition {partition}, {sizes}"
    table.caption = f"largest stage: {max(loads) * config.stages / total:.3f} of the mean"
    table.title_justify = table.caption_justify = "left"
    return table


def shorten(units: Sequence[str]) -> str:
    """Return `embedding, block.0 .. block.5` for a consecutive run of units."""
    blocks = [unit for unit in units if unit.startswith("block.")]
    if len(blocks) < 3:
        return ", ".join(units)
    between = f"{blocks[0]} .. {blocks[-1]}"
    first, last = units[0] == "embedding", units[-1] == "head"
    return ", ".join(["embedding"] * first + [between] + ["head"] * last)
