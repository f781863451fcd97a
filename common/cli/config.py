"""From a command line and a TOML file to the runs of a benchmark: the grid and its baselines."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from common.cli.settings import (
    GRID,
    SECTIONS,
    Key,
    Setting,
    Settings,
    adapt,
    add_option,
    base_settings,
    check_corpora,
    flag,
    listed,
    make_run,
    read_native_dropout,
    read_toml,
    validated,
)
from common.harness.options import Bench, BenchOptions
from common.io.usage import UsageError, closest
from common.schedule.generators import GENERATORS
from common.spec.rules import why_impossible
from common.spec.run import PRESETS, RunConfig

# ------------------------------------------------------------------------------------- command line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of the benchmark, in groups. The namespace holds only those given."""
    groups = {
        "grid": parser.add_argument_group(
            "what to compare",
            "Each of these takes a list, such as 1,2,4; several lists make a grid.",
        ),
        "bench": parser.add_argument_group("the benchmark"),
        "run": parser.add_argument_group("the run"),
        "model": parser.add_argument_group(
            "the model", "Defaults are those of the preset 'small'."
        ),
        "train": parser.add_argument_group(
            "the training", "Defaults are those of the preset 'small'."
        ),
    }
    groups["bench"].add_argument(
        "--config",
        metavar="FILE.toml",
        help="settings in TOML, with tables [model] and [train]; the command line goes before it",
    )
    groups["bench"].add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the partition plans and schedules, run nothing",
    )
    defaults = base_settings("small")
    ordered = [
        *reversed(GRID),
        *((section, name) for section in SECTIONS for name in SECTIONS[section].model_fields),
    ]
    for section, name in dict.fromkeys(ordered):
        if section == "run" and name in ("model", "train"):
            continue
        field = SECTIONS[section].model_fields[name]
        group = groups["grid" if (section, name) in GRID else section]
        default = defaults[section, name].value if (section, name) in defaults else field.default
        add_option(group, section, name, field, default)


# ------------------------------------------------------------------------------------------- layers


def read_bench(arguments: argparse.Namespace) -> Bench:
    """Return the benchmark that the command line and its TOML file ask for. Raises UsageError."""
    line: Settings = {}
    for dest, value in vars(arguments).items():
        section, _, name = dest.partition(".")
        if section in SECTIONS and name:
            line[section, name] = Setting(value, flag(name))
    file = {} if arguments.config is None else read_toml(Path(arguments.config))
    preset = (file | line).get(("bench", "preset"), Setting("small", ""))
    if not isinstance(preset.value, str) or preset.value not in PRESETS:
        raise UsageError(
            f"{preset.where} = {preset.value!r}: unknown{closest(str(preset.value), PRESETS)}"
        )
    base = base_settings(preset.value)
    file = read_native_dropout(file, base)
    given = file | read_native_dropout(line, base | file)
    settings = base | given
    adapt(settings, given)
    options = BenchOptions(**validated("bench", settings))
    points, left_out = _grid(settings)
    if options.baselines:
        points = tuple(
            dict.fromkeys((*points, *_native_baselines(points), *_plain_baselines(points)))
        )
    _check_bench(options, points, settings)
    check_corpora(points)
    return Bench(options, points, bool(arguments.dry_run), left_out)


# --------------------------------------------------------------------------------------- validation


def _grid(settings: Settings) -> tuple[tuple[RunConfig, ...], str]:
    """Return every combination of the listed values, each validated before anything runs.

    Of `all` schedules those are left out that do not fit where another one does; the second result
    says which, and why.
    """
    key: Key = ("run", "schedule")
    takes_all = listed(settings[key].value) == ["all"]
    if takes_all:
        settings = settings | {key: Setting(list(GENERATORS), settings[key].where)}
    axes = [
        [(key, value) for value in listed(settings[key].value)] for key in GRID if key in settings
    ]
    for axis in axes:
        if not axis:
            empty = next(key for key in GRID if key in settings and not listed(settings[key].value))
            raise UsageError(f"{settings[empty].where}: an empty list; expected at least one value")
    points, fitting, errors = [], set(), []
    for combination in itertools.product(*axes):
        chosen = settings | {key: Setting(value, settings[key].where) for key, value in combination}
        *place, name = (value for _, value in sorted(combination, key=lambda pair: pair[0] == key))
        try:
            points.append(make_run(chosen))
            fitting.add(tuple(place))
        except UsageError as error:
            errors.append((tuple(place), name, str(error)))
    misfits = [error for error in errors if takes_all and error[0] in fitting]
    distinct = list(dict.fromkeys(error[-1] for error in errors if error not in misfits))
    if distinct:
        more = (
            f" (and {len(distinct) - 1} more points of the grid are impossible)"
            if len(distinct) > 1
            else ""
        )
        raise UsageError(distinct[0] + more)
    left_out = dict.fromkeys(f"{name} ({text})" for _, name, text in misfits)
    return tuple(dict.fromkeys(points)), "; ".join(left_out)


def _native_baselines(points: Sequence[RunConfig]) -> list[RunConfig]:
    """The framework's own pipeline for every point that it can run."""
    native = [
        point.model_copy(update={"executor": "native", "track": "matched"}) for point in points
    ]
    return [
        baseline
        for point, baseline in zip(points, native, strict=True)
        if _has_baselines(point) and not why_impossible(baseline)
    ]


def _plain_baselines(points: Sequence[RunConfig]) -> list[RunConfig]:
    """The plain loop of every framework: one device, the whole mini-batch at once, all the threads."""  # noqa: E501
    alone = {
        "executor": "plain",
        "track": "matched",
        "stages": 1,
        "chunks": 1,
        "schedule": "naive",
        "partition": "even",
    }
    plain = [
        point.model_copy(
            update=alone | {"train": point.train.model_copy(update={"micro_batches": 1})}
        )
        for point in points
        if _has_baselines(point)
    ]
    return [baseline for baseline in plain if not why_impossible(baseline)]


def _has_baselines(point: RunConfig) -> bool:
    """Baselines neither recompute nor drift."""
    return point.executor == "table" and point.recompute == "none" and point.drift is None


def _check_bench(options: BenchOptions, points: Sequence[RunConfig], settings: Settings) -> None:
    steps = min(point.train.steps for point in points)
    if options.untimed_steps and options.untimed_steps >= steps > 1:
        where = settings["bench", "untimed_steps"].where
        raise UsageError(
            f"{where} = {options.untimed_steps} leaves none of {steps} steps; expected 0 to "
            f"{steps - 1}"
        )
    swept = {(point.stages, point.train.micro_batches) for point in points}
    if options.sweep and len(swept) < 2:
        raise UsageError(
            "--sweep: one point only; give a list, --micro-batches 1,2,4 or --stages 1,2,4"
        )
