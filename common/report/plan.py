"""What a plan says, in text and as a picture. Reads plans; measures and decides nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.io.figure import new_figure
from common.report.result import RunResult
from common.spec.efficiency import model_flops_per_token
from common.spec.memory import DeviceMemory
from common.spec.plan import Plan, Plans, Refused

WORTH = 0.005
"""A gain below this share of a step is none."""


def size(count: float) -> str:
    """Return bytes for people: `3.1 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.3g} {unit}"
    return f"{count:.0f} bytes"


def table_of(plans: Sequence[Plan]) -> Table:
    """Return one row per plan."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = (
        "schedule",
        "p",
        "v",
        "m",
        "recompute",
        "partition",
        "step ms",
        "tokens/s",
        "bubble",
        "MFU",
    )
    for title in (*titles, "fullest device"):
        table.add_column(
            title, justify="left" if title in ("schedule", "recompute", "partition") else "right"
        )
    for plan in plans:
        config = plan.config
        table.add_row(
            config.schedule,
            str(config.stages),
            str(config.chunks),
            str(config.train.micro_batches),
            config.recompute,
            boundaries(plan) or "-",
            f"{plan.step_seconds * 1e3:,.1f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.bubble_fraction:.1%}",
            "-" if plan.mfu is None else f"{plan.mfu:.0%}",
            size(plan.peak_bytes),
        )
    return table


def efficiency(plan: Plan) -> str:
    """Say what a plan computes, counted as the report counts it."""
    flops = model_flops_per_token(plan.config)
    words = f"model FLOPs: {flops / 1e6:,.2f} million a token"
    words += f", {plan.model_flops_per_device / 1e12:,.4g} TFLOP/s per device"
    if plan.peak_flops_per_device is None:
        return words
    return f"{words}, MFU {plan.mfu:.1%} of {plan.peak_flops_per_device / 1e12:,.4g} TFLOP/s"


def memory_table(memory: Sequence[DeviceMemory]) -> Table:
    """Return the bytes of every device, by what they are for."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("device", "weights", "gradients", "moments", "activations", "recomputation", "total")
    for title in titles:
        table.add_column(title, justify="right")
    for device, each in enumerate(memory):
        parts = (
            each.weights_bytes,
            each.gradients_bytes,
            each.moments_bytes,
            each.activations_bytes,
            each.recompute_bytes,
            each.total_bytes,
        )
        table.add_row(str(device), *(size(part) if part else "-" for part in parts))
    return table


def boundaries(plan: Plan) -> str:
    return ",".join(map(str, plan.config.partition))


def _size(plan: Plan) -> tuple[str, int, int]:
    return plan.config.schedule, plan.config.stages, plan.config.chunks


def what_binds(plans: Plans, unlimited: Plans) -> str:
    """Say what keeps the best plan from being faster: memory, granularity or the bubble."""
    best, free = plans.found[0], unlimited.found[0]
    if free.step_seconds < best.step_seconds * (1 - WORTH):
        return (
            f"memory: without a limit {describe(free)} would take "
            f"{1 - free.step_seconds / best.step_seconds:.1%} less, with "
            f"{size(free.peak_bytes)} on its fullest device"
        )
    m = best.config.train.micro_batches
    finer = [
        plan
        for plan in unlimited.found
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
    config = plan.config
    again = f", recompute {config.recompute}" if config.recompute != "none" else ""
    return (
        f"{config.schedule} p={config.stages} v={config.chunks} "
        f"m={config.train.micro_batches}{again}"
    )


def show(console: Console, plans: Plans, unlimited: Plans) -> None:
    """Print the best plan with its reasons, the best of every schedule, and why others are out."""
    best = plans.found[0]
    console.print(table_of(list(plans.best_per_schedule().values())), soft_wrap=True)
    console.print(f"\nbest: {describe(best)}", highlight=False)
    console.print(memory_table(best.memory))
    console.print(efficiency(best), highlight=False, soft_wrap=True)
    console.print(f"limited by {what_binds(plans, unlimited)}", highlight=False, soft_wrap=True)
    nearest: dict[str, Refused] = {}
    for refused in plans.refused:
        nearest.setdefault(refused.config.schedule, refused)
    for name, refused in nearest.items():
        out = sum(each.config.schedule == name for each in plans.refused)
        console.print(
            f"left out: {name}, {out} of them; {missing(refused)}", highlight=False, soft_wrap=True
        )


def verified(plans: Sequence[Plan], results: Sequence[RunResult]) -> Table:
    """Return predicted beside measured steps (medians), and predicted over measured, less 1."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("plan", "predicted ms", "measured ms", "difference"):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for plan in plans:
        runs = [result for result in results if result.config == plan.config]
        passed = all(result.parity.status == "pass" for result in runs)
        steps = [seconds for result in runs for seconds in result.steady_seconds if passed]
        predicted, measured = plan.step_seconds, statistics.median(steps) if steps else None
        table.add_row(
            describe(plan),
            f"{predicted * 1e3:,.1f}",
            "-" if measured is None else f"{measured * 1e3:,.1f}",
            "-" if measured is None else f"{predicted / measured - 1:+.1%}",
        )
    return table


def missing(refused: Refused) -> str:
    """Say by how much a candidate misses the limit, with the recomputation that holds least."""
    return (
        f"{describe(refused)} needs {size(refused.missing_bytes)} more on device {refused.device}"
    )


def draw(path: Path, plans: Plans, unlimited: Plans, limit_bytes: float) -> None:
    """Draw throughput against m for every schedule, and the memory that it takes."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    for name, fastest in unlimited.best_per_schedule().items():
        best = {
            plan.config.train.micro_batches: plan
            for plan in unlimited.found
            if _size(plan) == _size(fastest)
        }
        ms = sorted(best)
        speed = [best[m].tokens_per_second for m in ms]
        (line,) = left.plot(ms, speed, marker=".", label=f"{name}, p = {fastest.config.stages}")
        peaks = [best[m].peak_bytes / 1e9 for m in ms]
        right.plot(ms, peaks, marker=".", color=line.get_color(), label=name)
    chosen = plans.found[0] if plans.found else None
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
    left.legend(fontsize="small")
    figure.savefig(path, dpi=150)
