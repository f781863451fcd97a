"""The tables and the picture of docs/hosts.md, of the runs that `hosts.py` has left in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from common.io.figure import new_figure
from common.report.grid import Grid
from common.report.result import RunResult
from common.report.timing import Timing, simulated
from common.schedule.action import Op
from common.schedule.simulate import Simulation
from common.spec.parameters import parameter_shapes, unit_of
from common.spec.partition import plan_partition, schedule_of
from common.spec.run import ELEMENT_BYTES, FRAMEWORKS, RunConfig
from common.spec.traffic import traffic_bytes
from tests.campaigns.make_schedules import fill
from tests.hosts import ROOT

PAGE = ROOT / "docs" / "hosts.md"
PICTURE = "images/hosts-delay.png"
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
"""With their chunks for each device."""
PLACES = ("one process", "two processes", "two hosts")
SIZES = (2**12, 2**20, 2**24)


class Link(NamedTuple):
    milliseconds: float
    mbit: float

    def __str__(self) -> str:
        return f"{self.milliseconds:g} ms, {self.mbit:,g} Mbit/s"

    def transmission_seconds(self, size: float) -> float:
        """How long a message of so many bytes keeps it busy."""
        return size * 8 / (self.mbit * 1e6)

    def seconds(self, size: float) -> float:
        """One way, of a message of so many bytes."""
        return self.milliseconds / 1e3 + self.transmission_seconds(size)


LINKS = (Link(0.1, 10_000), Link(1, 1_000), Link(1, 100), Link(10, 1_000), Link(10, 100))
REDUCE_LINK = Link(1, 1_000)


def result_of(folder: Path) -> RunResult:
    (path,) = folder.glob("*/*/result.json")
    return RunResult.read(path)


def timing_of(folder: Path) -> Timing:
    timing = result_of(folder).timing
    assert timing is not None
    return timing


def message_bytes(config: RunConfig) -> int:
    """Of an activation of the largest micro-batch."""
    rows, model = max(config.micro_batch_sizes), config.model
    return rows * model.context_length * model.d_model * ELEMENT_BYTES[config.train.dtype]


def predicted_seconds(config: RunConfig, run: Timing, flat: Timing, link: Link) -> float:
    """The pipeline of a step, from the first action to the last, behind a link: by the simulator,
    from a run's actions, what a message takes without a link, and the link's two numbers.
    """
    delay = flat.hop_seconds + link.milliseconds / 1e3
    delayed = run.model_copy(update={"hop_seconds": delay})
    busy = link.transmission_seconds(message_bytes(config))
    return simulated(schedule_of(config), delayed, busy).makespan / 1e3


def steps(folder: Path) -> str:
    rows = []
    for place in [*PLACES, *map(str, LINKS)]:
        cells, measured = [], {}
        for name in SCHEDULES:
            here, flat = result_of(folder / place / name), timing_of(folder / PLACES[2] / name)
            assert here.timing is not None
            ours = measured[name] = here.timing.measured_step_seconds
            link = next((each for each in LINKS if str(each) == place), None)
            simulation = here.timing.simulated_step_seconds
            if link is not None:
                # The rest, loss, norm and optimizer, is none of the simulator's business.
                rest = ours - here.timing.measured_pipeline_seconds
                simulation = predicted_seconds(here.config, here.timing, flat, link) + rest
            cells.append(f"{ours * 1e3:,.0f} ({simulation / ours - 1:+.0%})")
        rows.append([place, *cells, min(measured, key=measured.__getitem__)])
    titles = ("step, ms (predicted)", *SCHEDULES, "fastest")
    first = result_of(folder / PLACES[2] / "1f1b")
    megabytes = sum(traffic_bytes(first.config).values()) / 1e6
    return (
        f"{table(titles, rows, (titles[0], titles[-1]))}\n\n"
        f"{len(first.steps)} steps of {preset_of(first)}, p = 2, m = "
        f"{first.config.train.micro_batches}; 1f1b sends {megabytes:.1f} MB a step, in messages of "
        f"{message_bytes(first.config) / 1e3:,.0f} KB. {first.machine.one_line}."
    )


def preset_of(result: RunResult) -> str:
    return f"{result.config.model.num_layers} blocks of width {result.config.model.d_model}"


def transports(folder: Path) -> str:
    rows = []
    for framework in FRAMEWORKS:
        found = json.loads((folder / f"transport-{framework}" / "found.json").read_text())
        for size in SIZES:
            latency, rate = found[str(size)]
            cells = (f"{latency * 1e3:,.2f}", f"{rate / 1e6:,.0f}")
            rows.append([framework, f"{size // 1024:,}", *cells])
    return table(("framework", "KB", "one way, ms", "MB/s"), rows, ("framework",))


def replicas(folder: Path) -> str:
    rows = []
    for framework in FRAMEWORKS:
        one, strong, weak = (
            result_of(folder / f"replicas/{framework}-{kind}") for kind in ("1", "strong", "weak")
        )
        speeds = [each.tokens_per_second or 0.0 for each in (one, strong, weak)]
        megabytes = sum(traffic_bytes(strong.config).values()) / 1e6
        cells = [f"{speed:,.0f}" for speed in speeds]
        gains = [f"{speed / speeds[0]:.2f}" for speed in speeds[1:]]
        rows.append([framework, cells[0], *cells[1:], *gains, f"{megabytes:.1f}"])
    titles = ("framework", "d = 1", "d = 2, strong", "d = 2, weak", "strong", "weak", "MB a step")
    return table(titles, rows, ("framework",))


def reduction(folder: Path) -> str:
    flush, overlap = (result_of(folder / "reduce" / kind) for kind in ("flush", "overlap"))
    times = [(each.timing or timing_of(folder)).measured_step_seconds for each in (flush, overlap)]
    assert flush.timing is not None
    theory = saving_seconds(flush.config, simulated(schedule_of(flush.config), flush.timing))
    cells = [f"{seconds * 1e3:,.0f}" for seconds in (*times, times[0] - times[1], theory)]
    titles = ("flush, ms", "overlap, ms", "saved, ms", "in theory, ms")
    return table(titles, [cells], ())


def saving_seconds(config: RunConfig, simulation: Simulation) -> float:
    """What it saves to sum a chunk behind its last weight gradient, and not all chunks at the end:
    one device, whose link is free before.
    """
    schedule, parts = schedule_of(config), plan_partition(config).parts
    ends: dict[int, float] = {}
    for action, end in zip(schedule.devices[0], simulation.end, strict=True):
        if action.op in (Op.W, Op.BW):
            ends[action.chunk] = float(end) / 1e3
    gradients = chunk_bytes(config, [list(parts[k]) for k in schedule.parts[0]])
    d = config.replicas
    # What each replica sends: its parts to the others, and then the sum of its own to all.
    takes = [2 * REDUCE_LINK.seconds((d - 1) / d * size) for size in gradients]
    free = 0.0
    for chunk in sorted(ends, key=ends.__getitem__):
        free = max(free, ends[chunk]) + takes[chunk]
    return max(ends.values()) + sum(takes) - free


def chunk_bytes(config: RunConfig, units: list[list[str]]) -> list[float]:
    """The gradients of each chunk."""
    element = ELEMENT_BYTES[config.train.master_dtype]
    return [
        float(
            sum(
                element * math.prod(shape)
                for name, shape in parameter_shapes(config.model).items()
                if unit_of(name) in own
            )
        )
        for own in units
    ]


def picture(folder: Path, path: Path) -> None:
    """Pipelines' times against a link's delay: lines are predicted, points measured."""
    figure = new_figure(8, 3.8)
    both = figure.subplots(1, 2, sharey=True)
    for axes, mbit in zip(both, (1_000, 100), strict=True):
        for number, name in enumerate(SCHEDULES):
            config = result_of(folder / PLACES[2] / name).config
            flat = timing_of(folder / PLACES[2] / name)
            delays = [10 ** (n / 10) / 10 for n in range(26)]
            times = [1e3 * predicted_seconds(config, flat, flat, Link(ms, mbit)) for ms in delays]
            axes.plot(delays, times, color=f"C{number}", label=name)
            there = [link for link in LINKS if link.mbit == mbit]
            runs = [timing_of(folder / str(link) / name) for link in there]
            measured = [1e3 * run.measured_pipeline_seconds for run in runs]
            delays = [link.milliseconds for link in there]
            axes.plot(delays, measured, "o", color=f"C{number}", markersize=4)
        axes.set_title(f"{mbit:,} Mbit/s", fontsize="medium")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("delay of the link, ms")
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("a step's pipeline, ms")
    both[0].set_ylim(bottom=0)
    both[0].legend(frameon=False, title="lines: predicted; points: measured")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def table(titles: tuple[str, ...], rows: list[list[str]], words: tuple[str, ...]) -> str:
    return Grid(titles, rows, words).markdown().strip()


def write_page(folder: Path, page: Path) -> None:
    for part in (steps, transports, replicas, reduction):
        fill(part.__name__, part(folder), page)
    picture(folder, page.parent / PICTURE)
