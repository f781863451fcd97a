"""What a plan says, in text and as a picture. Reads plans; measures and decides nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.io.console import say
from common.io.figure import new_figure
from common.report.grid import Grid
from common.report.result import RunResult
from common.spec.efficiency import model_flops_per_token
from common.spec.memory import DeviceMemory
from common.spec.mesh import Mesh
from common.spec.plan import Plan, Plans, Refused, best_per_schedule

WORTH = 0.005
"""A gain below this share of a step is none."""


def size(count: float) -> str:
    """Return bytes for people: `3.1 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:  # 999.6 kB are 1 MB, and not 1e+03 kB
            return f"{count / factor:,.3g} {unit}"
    return f"{count:.0f} byte{'s' * (count != 1)}"


def size_enough(count: int) -> str:
    """Return bytes that are no fewer: with the 303,001 that are missing, `304 kB` is enough."""
    step = 10 ** max(0, len(str(count)) - 3)
    return size(-(-count // step) * step)


def milliseconds(seconds: float) -> str:
    """Return a step for people, with three digits at least: `0.0132`, `431.7`."""
    ms = seconds * 1e3
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3g}"


def table_of(plans: Sequence[Plan]) -> Table:
    """Return one row per plan."""
    words = ("schedule", "recompute", "partition")
    has_lines = any(Mesh.of(plan.config).lines > 1 for plan in plans)
    axes = ("d", "t") if has_lines else ()
    titles = ("schedule", "p", *axes, "v", "m", *words[1:], "step ms", "tokens/s", "bubble", "MFU")
    cells = [
        [
            plan.config.schedule,
            str(plan.config.stages),
            *([str(plan.config.replicas), str(plan.config.tensor_parallel)] if has_lines else []),
            str(plan.config.chunks),
            str(plan.config.train.micro_batches),
            plan.config.recompute,
            boundaries(plan) or "-",
            milliseconds(plan.step_seconds),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.bubble_fraction:.1%}",
            "-" if plan.mfu is None else f"{plan.mfu:.0%}",
            size(plan.peak_bytes),
        ]
        for plan in plans
    ]
    return Grid((*titles, "fullest device"), cells, words).rich()


def efficiency(plan: Plan) -> str:
    """Say what a plan computes, counted as the report counts it."""
    words = f"model FLOPs: {model_flops_per_token(plan.config) / 1e6:,.2f} million a token"
    words += f", {plan.model_flops_per_device / 1e12:,.4g} TFLOP/s per device"
    if plan.peak_flops_per_device is None:
        return words
    return f"{words}, MFU {plan.mfu:.1%} of {plan.peak_flops_per_device / 1e12:,.4g} TFLOP/s"


def memory_table(memory: Sequence[DeviceMemory]) -> Table:
    """Return the bytes of every device, by what they are for."""
    titles = ("device", "weights", "gradients", "moments", "activations", "recomputation", "total")
    cells = []
    for device, each in enumerate(memory):
        parts = (
            *(each.weights_bytes, each.gradients_bytes, each.moments_bytes),
            *(each.activations_bytes, each.recompute_bytes, each.total_bytes),
        )
        cells.append([str(device), *(size(part) if part else "-" for part in parts)])
    return Grid(titles, cells, ()).rich()


def boundaries(plan: Plan | Refused) -> str:
    return ",".join(map(str, plan.config.partition))


def _size(plan: Plan) -> tuple[str | int, ...]:
    config = plan.config
    return (
        *(config.schedule, config.stages, config.chunks),
        *(config.replicas, config.tensor_parallel),
    )


def what_binds(plans: Plans) -> str:
    """Say what keeps the best plan from being faster: memory, granularity or the bubble."""
    # First what more memory would change, then what a finer cut would; what is left is the bubble,
    # if there is one.
    best, free = plans.found[0], plans.unlimited[0]
    if free.step_seconds < best.step_seconds * (1 - WORTH):
        return (
            f"memory: without a limit {describe(free)} would take "
            f"{1 - free.step_seconds / best.step_seconds:.1%} less, with "
            f"{size(free.peak_bytes)} on its fullest device"
        )
    if best.bubble_fraction < 1e-9:
        return "arithmetic: no device waits"
    m = best.config.train.micro_batches
    finer = [
        plan
        for plan in plans.unlimited
        if plan.config.train.micro_batches > m and _size(plan) == _size(best)
    ]
    if m == best.config.train.batch_size:
        return f"granularity: m = {m} is one sequence in every micro-batch"
    if finer and finer[0].bubble_fraction < best.bubble_fraction:
        return (
            f"granularity: m = {finer[0].config.train.micro_batches} has a smaller bubble "
            f"({finer[0].bubble_fraction:.1%}), and takes "
            f"{finer[0].step_seconds / best.step_seconds - 1:.1%} longer: every micro-batch costs "
            "something by itself"
        )
    return f"bubble: {best.bubble_fraction:.1%} of the devices' time"


def describe(plan: Plan | Refused) -> str:
    """Say which schedule, sizes and recomputation."""
    config = plan.config
    again = f", recompute {config.recompute}" if config.recompute != "none" else ""
    axes = {"p": config.stages, "d": config.replicas, "t": config.tensor_parallel}
    words = " ".join(f"{name}={size}" for name, size in axes.items() if size > 1 or name == "p")
    return f"{config.schedule} {words} v={config.chunks} m={config.train.micro_batches}{again}"


def show(console: Console, plans: Plans) -> None:
    """Print the best plan with its reasons, the best of every schedule, and why others are out."""
    best = plans.found[0]
    console.print(table_of(list(best_per_schedule(plans.found).values())), soft_wrap=True)
    say(console, f"\nbest: {describe(best)}")
    console.print(memory_table(best.memory))
    say(console, efficiency(best))
    say(console, f"limited by {what_binds(plans)}")
    for refused in plans.refused:
        name = refused.config.schedule
        say(console, f"left out: {name}, {refused.count} of them; {missing(refused)}")


def verified(plans: Sequence[Plan], results: Sequence[RunResult]) -> Table:
    """Return predicted beside measured steps (medians), and predicted over measured, less 1."""
    cells = []
    for plan in plans:
        runs = [result for result in results if result.config == plan.config]
        passed = all(result.parity.status == "pass" for result in runs)
        steps = [seconds for result in runs for seconds in result.steady_seconds if passed]
        predicted, measured = plan.step_seconds, statistics.median(steps) if steps else None
        seen = ("-", "-")
        if measured is not None:
            seen = milliseconds(measured), f"{predicted / measured - 1:+.1%}"
        cells.append([describe(plan), milliseconds(predicted), *seen])
    return Grid(("plan", "predicted ms", "measured ms", "difference"), cells, ("plan",)).rich()


def missing(refused: Refused) -> str:
    """Say by how much the nearest candidate misses the limit."""
    cut = f", partition {boundaries(refused)}" if refused.config.stages > 1 else ""
    more = size_enough(refused.missing_bytes)
    return f"{describe(refused)}{cut} needs {more} more on device {refused.device}"


def draw(path: Path, plans: Plans, limit_bytes: float) -> None:
    """Draw throughput against m for every schedule, and the memory that it takes."""
    figure = new_figure(10, 5)
    left, right = figure.subplots(1, 2)
    chosen = plans.found[0] if plans.found else None
    shown = best_per_schedule(plans.unlimited)
    if chosen is not None:  # what was chosen lies on its own curve
        shown[chosen.config.schedule] = chosen
    for i, (name, fastest) in enumerate(shown.items()):
        # A curve is one schedule on one grid of devices: only m changes along it.
        best = {
            plan.config.train.micro_batches: plan
            for plan in plans.unlimited
            if _size(plan) == _size(fastest)
        }
        style = {"marker": ".", "linestyle": "-" if i < 10 else "--"}  # there are ten colors
        ms = sorted(best)
        speed = [best[m].tokens_per_second for m in ms]
        (line,) = left.plot(ms, speed, label=f"{name}, p = {fastest.config.stages}", **style)
        peaks = [best[m].peak_bytes / 1e9 for m in ms]
        right.plot(ms, peaks, color=line.get_color(), **style)
    if chosen is not None:
        m = chosen.config.train.micro_batches
        left.plot(m, chosen.tokens_per_second, "o", ms=12, mfc="none", mec="black")
        right.plot(m, chosen.peak_bytes / 1e9, "o", ms=12, mfc="none", mec="black")
    if limit_bytes < float("inf"):
        right.axhline(limit_bytes / 1e9, color="black", ls="--")
        right.annotate("limit", (1, limit_bytes / 1e9), va="bottom")
    for axes, title in ((left, "tokens/s"), (right, "GB on the fullest device")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("micro-batches m")
        axes.set_ylabel(title)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
