"""A relay: a training that frameworks do in turn, against the oracle, which does all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from common.checkpoint import Arrays
from common.io.edges import OsText
from common.io.figure import small_print
from common.oracle.limits import LIMITS, difference
from common.report.losses import LossCurve
from common.report.machine import Machine
from common.report.plots import DPI, RANGE_COLOR, draw_losses
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
    found = []
    for name, right in expected.items():
        key = TensorKey(0, "trained", 0, -1, unit_of(name), name)
        error = difference(key, "trained_parameter", weights[name], right, 0)
        found.append((error.relative, name))
    return max(found)


def draw_relay(relay: Relay, path: Path) -> None:
    """Draw the joined loss curve, and its difference from the oracle's, as in a report; dotted
    where a checkpoint changes hands.
    """
    curves = []
    for leg in relay.legs:
        config, first = leg.config, leg.first_step
        name = f"{config.framework}, p={config.stages}, {config.schedule_name}"
        expected = relay.oracle_losses[first : first + len(leg.losses)]
        curves.append(
            LossCurve(name, config.framework, leg.losses, expected, relay.loss_limit, first)
        )
    with small_print():
        figure = draw_losses(curves)
    figure.axes[-1].set_xlabel("step (dotted: a checkpoint changes hands)")
    for axes in figure.axes:
        for leg in relay.legs[:-1]:
            axes.axvline(leg.steps_done, color=RANGE_COLOR, linewidth=0.6, linestyle=":")
    figure.savefig(path, dpi=DPI)


TITLES = (
    *("framework", "version", "p", "schedule", "steps", "loss, largest diff."),
    *("weights, largest diff.", "in"),
)


def summary(relay: Relay) -> list[list[str]]:
    """Return a row per leg: who, steps, differences."""
    rows = []
    for leg in relay.legs:
        config, steps = leg.config, f"{leg.first_step + 1} to {leg.steps_done}"
        who = [config.framework, leg.version, str(config.stages), config.schedule_name, steps]
        differences = [f"{leg.loss_difference:.1e}", f"{leg.weight_difference:.1e}"]
        rows.append([*who, *differences, leg.weight_difference_name])
    return rows
