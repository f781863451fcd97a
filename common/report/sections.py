"""What a report shows, section by section: made once, written as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.report import baselines, tables
from common.report.collect import Collection
from common.report.facts import TIMING_LEGEND, timing_note
from common.report.grid import Grid
from common.report.plots import PART_COLORS
from common.report.sweep import Axis, Curve
from common.report.timeline import timelines
from common.spec.mesh import Mesh
from common.spec.traffic import traffic_bytes


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in the order of the fields."""

    name: str
    title: str
    lead: str = ""
    grid: Grid | None = None
    picture: str = ""
    """The name of its file, without `.png`."""
    details: Grid | None = None
    lines: Sequence[str] = ()
    note: str = ""


def sections(collection: Collection, swept: Mapping[Axis, Sequence[Curve]]) -> list[Section]:
    """Return the sections that have something to show."""
    tracks = tables.by_track(collection.rows)
    found = []
    for track, rows in tracks.items():
        is_last = track == list(tracks)[-1]
        found.append(
            Section(
                f"throughput-{track}",
                "Throughput" if list(tracks) == ["matched"] else f"Throughput, {track}",
                grid=tables.grid(rows),
                picture="throughput" if is_last else "",
                note=tables.LEGEND if is_last else "",
            )
        )
    if ratios := baselines.baseline_ratios(collection):
        cells = [[r.ours.name, r.baseline.name, r.ratio.text(), r.ratio.verdict] for r in ratios]
        titles = ("ours", "baseline", "ratio [95 %]", "verdict")
        grid = Grid(titles, cells, ("ours", "baseline", "verdict"))
        found.append(Section("baselines", "Against the baselines", "", grid, note=baselines.LEGEND))
    found.append(Section("parity", "Parity and loss", "", _parity(collection), "loss", note=PARITY))
    if any(group.timing for group in collection.groups):
        found.append(
            Section(
                "timing",
                "Measured against simulated",
                timing_note(collection),
                _timing(collection),
                "time_split",
                _stages(collection),
                note=TIMING_LEGEND,
            )
        )
    for axis, curves in swept.items():
        words, name = [curve.sentence for curve in curves], axis.replace("_", "-")
        note = f"{IDEAL}{SCALED.get(axis, '')}{LEFT_OUT}"
        title, picture = f"Throughput over {name}", f"sweep_{axis}"
        found.append(Section(f"sweep-{name}", title, "", None, picture, None, words, note))
    if any(row.model_tflops_per_device for row in collection.rows):
        grid = _efficiency(collection.rows)
        found.append(Section("efficiency", "Efficiency", "", grid, note=EFFICIENCY))
    if any(row.stages * row.replicas > 1 or row.shards for row in collection.rows):
        found.append(Section("traffic", "Traffic", "", _traffic(collection), "mesh", note=TRAFFIC))
    if any(group.shown for group in collection.groups):
        found.append(Section("memory", "Memory", "", _memory(collection), note=MEMORY))
    return found


PARITY = (
    "Worst error of each check as a share of its limit, against the float64 NumPy oracle; 100 % "
    "would fail."
)
IDEAL = "Dotted: the first point scaled by the ideal, m / (m + p - 1) for equal micro-batches"
SCALED = {"stages": " x p", "replicas": " x d"}
LEFT_OUT = ", which leaves out that small micro-batches compute less efficiently."
MEMORY = (
    "In flight: chunks of micro-batches whose forward has run and whose backward has not, at "
    "most, as the executor counted and as the simulator says. Held activations: bytes of tensors "
    "kept for the backward, so that threads and processes compare. Peak: the resident size of the "
    "process, under its first device (threads of one process share it); on CUDA the allocator's "
    "peak of the device. MB: 10^6 bytes."
)

TRAFFIC = (
    "What one step sends, by formulas and over all processes: activations and their gradients from "
    "stage to stage (in threads of one process it is a pointer), gradients of parameters from "
    "replica to replica, 2 (d - 1) times those of the model, sums within blocks from shard to "
    "shard. MB: 10^6 bytes."
)

EFFICIENCY = (
    "Model FLOPs: the matrix products of forward and backward, 6 N + 12 L S D a token for N "
    "weights that multiply, L blocks, S positions, width D; recomputation is not counted, and a "
    "multiply-add is 2. A device is a card, on the CPU a stage. Peak: large matrix products in "
    "the run's dtype, measured between the runs, of all devices together. MFU (model FLOPs "
    "utilization): the share of the peak that the model FLOPs are; published: of the cards' data "
    "sheets."
)


def _efficiency(rows: Sequence[tables.Row]) -> Grid:
    """One line per row that was timed; what nobody measured has no column."""
    cells = [
        [
            row.name,
            f"{row.model_flops_per_token / 1e6:,.2f}",
            tables.number(row.model_tflops_per_device, ",.4g"),
            tables.number(row.peak_tflops, ",.4g"),
            tables.number(row.mfu, ".1%"),
            tables.number(row.published_peak_tflops, ",.4g"),
            tables.number(row.published_mfu, ".1%"),
            row.peak_measured_by,
        ]
        for row in rows
        if row.model_tflops_per_device is not None
    ]
    titles = (
        "row", "model MFLOP/token", "TFLOP/s per device", "peak TFLOP/s", "MFU",
        "published TFLOP/s", "published MFU", "measured by",
    )  # fmt: skip
    empty = [title for i, title in enumerate(titles) if not any(line[i] for line in cells)]
    return Grid(titles, cells, ("row", "measured by")).without(empty)


def _parity(collection: Collection) -> Grid:
    """Per row and check the worst error over its limit, over all repeats."""
    # A dictionary as an ordered set: the order in which runs were compared.
    checks: dict[str, None] = {}
    for result in collection.results:
        checks |= dict.fromkeys(result.parity.margins)
    cells, styles = [], []
    for row, group in collection.pairs:
        parities = [result.parity for result in group.results]
        worst = [
            max((p.margins[check] for p in parities if check in p.margins), default=None)
            for check in checks
        ]
        tensors = max(parity.tensors for parity in parities)
        reason = next((parity.reason for parity in parities if parity.reason), "")
        margins = ["" if margin is None else f"{margin:.2%}" for margin in worst]
        cells.append([row.name, row.parity or "not run", str(tensors or ""), *margins, reason])
        styles.append("red" if row.parity == "FAIL" else "")
    titles = ["row", "parity", "tensors", *(check.replace("_", " ") for check in checks), "reason"]
    grid = Grid(titles, cells, ("row", "parity", "reason"), styles)
    return grid if any(line[-1] for line in cells) else grid.without(["reason"])


def _timing(collection: Collection) -> Grid:
    """Red where the simulated step is more than 5 % off."""
    titles = (
        "row", "pipeline ms", "simulated ms", "replayed ms", "bubble", "simulated bubble",
        "step ms", "simulated step ms", "difference", "hop ms",
    )  # fmt: skip
    cells, styles = [], []
    for row, group in collection.pairs:
        if (t := group.timing) is None:
            continue
        seconds = (
            t.measured_pipeline_seconds, t.simulated_pipeline_seconds, t.replayed_pipeline_seconds,
            t.measured_step_seconds, t.simulated_step_seconds,
        )  # fmt: skip
        pipeline, simulated, replayed, step, simulated_step = (f"{s * 1e3:,.1f}" for s in seconds)
        bubbles = [f"{t.measured_bubble_fraction:.1%}", f"{t.simulated_bubble_fraction:.1%}"]
        bubbles = ["shared GPU"] * 2 if row.shares_gpu else bubbles
        steps = [step, simulated_step, f"{t.step_difference:+.1%}", f"{t.hop_seconds * 1e3:.2f}"]
        cells.append([row.name, pipeline, simulated, replayed, *bubbles, *steps])
        styles.append("" if abs(t.step_difference) <= 0.05 else "red")
    return Grid(titles, cells, ("row",), styles)


def _stages(collection: Collection) -> Grid:
    """Where each stage's step goes, in numbers."""
    cells = []
    for row, group in collection.pairs:
        for device, time in group.timing.stages.items() if group.timing else ():
            parts = [getattr(time, part.replace(" ", "_")) for part in PART_COLORS]
            shares = [f"{each * 1e3:,.1f} ({each / time.total:.0%})" for each in parts]
            cells.append([row.name, str(device), *shares, f"{time.total * 1e3:,.1f}"])
    return Grid(
        ["row", "stage", *(f"{part} ms" for part in PART_COLORS), "sum ms"], cells, ("row",)
    )


def _traffic(collection: Collection) -> Grid:
    """One line per row that sends anything."""
    cells = []
    for row, group in collection.pairs:
        config = group.results[0].config
        mesh = Mesh.of(config)
        if config.executor == "plain" or mesh.size == 1:
            continue
        # Both directions of an edge count: it is what all processes together send.
        sums = dict.fromkeys(("stages", "replicas", "shards"), 0)
        for (a, b), count in traffic_bytes(config).items():
            sums[mesh.axis(a, b)] += count
        cells.append([row.name, *(f"{n / 1e6:,.2f}" for n in (*sums.values(), sum(sums.values())))])
    titles = ["row", *(f"between {axis} MB" for axis in sums), "sum MB a step"]
    grid = Grid(titles, cells, ("row",))
    return grid if any(row.shards for row in collection.rows) else grid.without([titles[3]])


def _memory(collection: Collection) -> Grid:
    """One line per row and device, red where more or fewer were held than the simulator says."""
    cells, styles = [], []
    for row, group in collection.pairs:
        if group.shown is None:
            continue
        result = group.shown.result
        charts = list(timelines(result).values())
        planned = charts[-1].peak_chunks_in_flight_per_stage if charts else []
        for device in range(result.config.stages):
            counted = result.in_flight_peak.get(device)
            expected = planned[device] if planned else None
            held = result.held_activation_peak_bytes.get(device)
            # Of the replica that took most.
            peaks = result.peak_memory_bytes.items()
            own = [size for number, size in peaks if number % result.config.stages == device]
            peak = max(own, default=None)
            numbers = [
                tables.number(counted, "d"),
                tables.number(expected, "d"),
                tables.number(held and held / 1e6, ",.1f"),
                tables.number(peak and peak / 1e6, ",.0f"),
            ]
            cells.append([row.name, str(device), *numbers])
            styles.append("" if None in (counted, expected) or counted == expected else "red")
    titles = ("row", "device", "in flight", "simulated", "held activations MB", "peak memory MB")
    return Grid(titles, cells, ("row",), styles)
