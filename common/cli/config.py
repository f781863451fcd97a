"""From a command line and a TOML file to the runs of a benchmark: the grid and its baselines."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from common.cli.options import TITLES, add_config, add_option
from common.cli.python import add_python, check_names, named_pythons, with_python
from common.cli.settings import (
    FIELDS,
    PLURALS,
    Key,
    Setting,
    Settings,
    base_settings,
    check_corpora,
    layered,
    listed,
    make_run,
    read_given,
    read_preset,
    validated,
)
from common.harness.options import Bench, BenchOptions
from common.io.usage import UsageError
from common.schedule.generators import GENERATORS
from common.spec.rules import why_impossible
from common.spec.run import RunConfig

SCHEDULE: Key = ("run", "schedule")
# The last one changes fastest, so the frameworks of one schedule stand side by side.
GRID: tuple[Key, ...] = (
    *(("run", "track"), ("train", "dtype"), ("run", "recompute"), ("run", "executor")),
    *(("run", "chunks"), ("train", "micro_batches"), ("run", "tensor_parallel")),
    *(("run", "compress"), ("run", "replicas"), ("run", "stages")),
    SCHEDULE,
    ("run", "framework"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of the benchmark, in groups. The namespace holds only those given."""
    lists = "Each of these takes a list, such as 1,2,4; several lists make a grid, without the "
    lists += "points that cannot be."
    groups = {
        "grid": parser.add_argument_group("what to compare", lists),
        "bench": parser.add_argument_group("the benchmark"),
    }
    for section, title in TITLES.items():
        text = None if section == "run" else "Defaults are those of the preset 'small'."
        groups[section] = parser.add_argument_group(title, text)
    add_config(groups["bench"])
    groups["bench"].add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the partition plans and schedules, run nothing",
    )
    add_python(groups["bench"])
    defaults = base_settings("small")
    for key in dict.fromkeys((*reversed(GRID), *FIELDS)):
        section, name = key
        if name == "python":
            continue
        group = groups["grid" if key in GRID else section]
        names = [PLURALS[name], name] if name in PLURALS else [name]
        add_option(group, key, defaults.value(*key), names, many=key in GRID)


def read_bench(arguments: argparse.Namespace) -> Bench:
    """Return the benchmark that the command line and its TOML file ask for. Raises UsageError."""
    file, line = read_given(arguments, PLURALS)
    line.update(named_pythons(arguments))
    settings = layered(base_settings(read_preset(file, line) or "small"), file, line)
    options = validated(BenchOptions, settings)
    points, left_out = _grid(settings)
    if options.baselines:
        points = tuple(dict.fromkeys((*points, *_baselines(points))))
    _check_bench(options, points, settings)
    check_names(points)
    check_corpora(points)
    return Bench(options, points, bool(arguments.dry_run), left_out)


def _grid(settings: Settings) -> tuple[tuple[RunConfig, ...], str]:
    """Return every combination of the listed values, each validated before anything runs.

    Left out are combinations whose values all run in others (`--replicas 1,2 --compress none,fp16`
    has no fp16 with one replica), or that an option of the whole grid does not go with
    (`--tensor-parallel 1,2 --vocab-parallel`); and of `all` schedules those that do not fit where
    another one does. The second result says which, and why.
    """
    # {schedule: [gpipe, 1f1b], framework: [torch, paddle]} makes four points.
    axes = {key: listed(settings[key].value) for key in GRID if key in settings}
    takes_all = axes[SCHEDULE] == ["all"]
    if takes_all:
        axes[SCHEDULE] = list(GENERATORS)
    for key, values in axes.items():
        if not values:
            raise UsageError(f"{settings[key].where}: an empty list; expected at least one value")
    points, fitting, errors = [], [], []
    for combination in itertools.product(*axes.values()):
        choice = dict(zip(axes, combination, strict=True))
        chosen = {key: Setting(value, settings[key].where) for key, value in choice.items()}
        try:
            points.append(make_run(with_python(settings | chosen)))
            fitting.append(choice)
        except UsageError as error:
            errors.append((choice, str(error)))
    runs = {key: [choice[key] for choice in fitting] for key in axes}
    places = [choice | {SCHEDULE: "all"} for choice in fitting] if takes_all else []
    wrong, left_out, of_the_whole = [], [], []
    for choice, text in errors:
        if choice | {SCHEDULE: "all"} in places:
            left_out.append(f"{choice[SCHEDULE]} ({text})")
        elif all(value in runs[key] for key, value in choice.items()):
            left_out.append(text)
        elif any(
            text.startswith((f"{each.where} ", f"{each.where}:"))
            for key, each in settings.items()
            if key not in axes
        ):
            of_the_whole.append(text)
        else:
            wrong.append(text)
    # Where nothing fits, what is wrong with a value of the grid is said first.
    (left_out if fitting else wrong).extend(of_the_whole)
    if wrong:
        first, *others = dict.fromkeys(wrong)
        more = f" (the first of {len(others) + 1} impossible points of the grid)" if others else ""
        raise UsageError(first + more)
    return tuple(dict.fromkeys(points)), "; ".join(dict.fromkeys(left_out))


def _baselines(points: Sequence[RunConfig]) -> list[RunConfig]:
    """Each framework's own pipeline, if any, and its plain loop; no drift, no recomputation."""
    ours = [p for p in points if (p.executor, p.recompute, p.drift) == ("table", "none", None)]
    native = [p.model_copy(update={"executor": "native", "track": "matched"}) for p in ours]
    # One device, the whole mini-batch at once, all the threads.
    alone = {"stages": 1, "chunks": 1, "schedule": "naive", "partition": "even"}
    plain = [
        p.model_copy(update={"train": p.train.model_copy(update={"micro_batches": 1}), **alone})
        for p in ours
    ]
    plain = [p.model_copy(update={"executor": "plain", "track": "matched"}) for p in plain]
    return [baseline for baseline in (*native, *plain) if not why_impossible(baseline)]


def _check_bench(options: BenchOptions, points: Sequence[RunConfig], settings: Settings) -> None:
    steps = min(point.train.steps for point in points)
    if options.untimed_steps and options.untimed_steps >= steps > 1:
        where = settings["bench", "untimed_steps"].where
        raise UsageError(
            f"{where} = {options.untimed_steps} leaves none of {steps} steps; expected 0 to "
            f"{steps - 1}"
        )
    swept = {(point.stages, point.replicas, point.train.micro_batches) for point in points}
    if options.sweep and len(swept) < 2:
        raise UsageError(
            "--sweep: one point only; give a list, such as --micro-batches 1,2,4, --stages 1,2,4 "
            "or --replicas 1,2"
        )
