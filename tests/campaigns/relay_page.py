"""A relay: one training that several frameworks do in turn, against the oracle that does all of it."""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from common.checkpoint import Arrays
from common.io.edges import OsText
from common.io.figure import log_y, new_figure
from common.oracle.limits import LIMITS, difference
from common.report.machine import Machine
from common.report.plots import DPI, FRAMEWORK_COLORS, ORACLE_COLOR
from common.spec.parameters import TensorKey, unit_of
from common.spec.run import RunConfig


class Leg(BaseModel):
    """What one framework did, from a checkpoint to a checkpoint."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    config: RunConfig
    first_step: int
    steps_done: int
    """Steps after it."""
    losses: tuple[float, ...]
    loss_difference: float
    """The largest relative difference from the oracle's losses, and its step."""
    loss_difference_step: int
    weight_difference: float
    """The largest relative difference of a weight at the leg's end from the oracle's, and its name.
    """
    weight_difference_name: str
    version: str
    seconds: float


class Relay(BaseModel):
    """The whole relay; `passed` if every leg is within the limits of the parity ladder."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    legs: tuple[Leg, ...]
    oracle_losses: tuple[float, ...]
    loss_limit: float
    weight_limit: float
    passed: bool
    command: OsText
    machine: Machine
    git_commit: str | None


def limits(dtype: str) -> tuple[float, float]:
    """Of the loss curve and of trained weights, as in the parity ladder."""
    return LIMITS["loss_curve"][dtype], LIMITS["trained_parameter"][dtype]


def largest_loss_difference(
    losses: Sequence[float], expected: Sequence[float]
) -> tuple[float, int]:
    """Return the largest relative difference and its index; infinite where a loss is lacking or not
    finite.
    """
    if len(losses) != len(expected) or not losses:
        return float("inf"), 0
    relative = np.abs(np.array(losses) / np.array(expected) - 1)
    relative[~np.isfinite(relative)] = np.inf
    return float(relative.max()), int(relative.argmax())


def largest_weight_difference(weights: Arrays, expected: Arrays) -> tuple[float, str]:
    """Return the largest relative difference of a tensor (Frobenius norm), and its name."""
    found = [
        (
            difference(
                TensorKey(0, "trained", 0, -1, unit_of(n), n),
                "trained_parameter",
                weights[n],
                want,
                0,
            ).relative,
            n,
        )
        for n, want in expected.items()
    ]
    return max(found)


def draw_relay(relay: Relay, path: Path) -> None:
    """Above: the joined loss curve over the oracle's. Below: their relative difference, with the
    limit.
    """

    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    oracle = np.array(relay.oracle_losses)
    above.plot(
        np.arange(1, len(oracle) + 1),
        oracle,
        color=ORACLE_COLOR,
        linewidth=4,
        alpha=0.45,
        label="oracle, uninterrupted",
    )
    for leg in relay.legs:
        color, config = FRAMEWORK_COLORS[leg.config.framework], leg.config
        steps = np.arange(leg.first_step + 1, leg.first_step + len(leg.losses) + 1)
        label = f"{config.framework}, p={config.stages}, {config.schedule_name}"
        above.plot(steps, leg.losses, color=color, linewidth=1.1, label=label)
        expected = oracle[leg.first_step : leg.first_step + len(leg.losses)]
        relative = np.abs(np.array(leg.losses) / expected - 1)
        # The same double has no place on a logarithmic axis; it stands at half of the smallest
        # possible difference.
        below.plot(
            steps, np.maximum(relative, np.finfo(float).eps / 2), ".", markersize=3, color=color
        )
        for axes in (above, below) if leg is not relay.legs[-1] else ():
            axes.axvline(leg.steps_done, color="#30343b", linewidth=0.6, linestyle=":")
    log_y(below)
    below.axhline(relay.loss_limit, color="#30343b", linewidth=0.9)
    below.annotate(f"limit {relay.loss_limit:g}", (1, relay.loss_limit), fontsize=8, va="top")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.set_ylabel("loss per token")
    below.set_ylabel("relative difference\nfrom the oracle")
    below.set_xlabel("step (dotted: a checkpoint changes hands)")
    above.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def summary(relay: Relay) -> list[list[Any]]:
    """One row per leg: who, steps, differences."""
    return [
        [
            leg.config.framework,
            leg.version,
            str(leg.config.stages),
            leg.config.schedule_name,
            f"{leg.first_step + 1} to {leg.steps_done}",
            f"{leg.loss_difference:.1e}",
            f"{leg.weight_difference:.1e}",
            leg.weight_difference_name,
        ]
        for leg in relay.legs
    ]
