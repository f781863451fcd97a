"""The subcommand plan: which p, d, t, m, v, schedule, partition and recomputation for a model."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.cli.numbers import positive
from common.cli.options import add_run_options, file_to_write, flag, read_run
from common.harness.bench import run_bench
from common.harness.options import Bench, BenchOptions
from common.harness.profile import Profile, profile
from common.io.console import make_console, say
from common.io.edges import number, printable, write_file
from common.io.usage import UsageError, chosen
from common.report import plan as shown
from common.report.collect import collect
from common.spec.efficiency import model_flops_per_token
from common.spec.plan import WEIGHED, Plans, best_per_schedule, make_plans
from common.spec.run import RunConfig
from common.spec.unit_times import UnitTimes, counted_times

EXIT_OK, EXIT_NOTHING_FITS = 0, 1
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIDED = ("stages", "chunks", "schedule", "partition", "recompute", "executor", "micro_batches")
"""What the plan decides, and so does not take."""
UNWEIGHED = ("compress",)
"""What its time model does not know: replicas are planned with whole gradients."""
COUNTED_FLOPS = 1e12
VERIFIED = 4


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser(
        "plan",
        description="Compares p, schedules, v up to 4 and m for this model by a memory and a time "
        "model, cuts the model to fit, recomputes where it must, and ranks what fits. "
        "Exit status: 0; 1 if nothing fits, with the nearest that does not; 2 wrong input.",
        usage="%(prog)s --devices N [options]",
    )
    parser.add_argument(
        "--devices", type=positive, required=True, metavar="N", help="how many there are"
    )
    parser.add_argument(
        "--memory-limit",
        type=read_size,
        default=float("inf"),
        metavar="SIZE",
        help="of every device: 32GB, 512MB, 80GiB (default: none)",
    )
    parser.add_argument("--schedules", metavar="S,..", help="only these (default: all but search)")
    parser.add_argument(
        "--replicas-allowed", action="store_true", help="weigh several pipelines too; needs --link"
    )
    parser.add_argument(
        "--shards-allowed", action="store_true", help="weigh tensor parallelism too; needs --link"
    )
    parser.add_argument(
        "--link",
        type=read_size,
        default=float("inf"),
        metavar="SIZE",
        help="bytes a second between two devices: 25GB (default: what travels takes no time but "
        "that of a message in the profile)",
    )
    costs = parser.add_mutually_exclusive_group()
    costs.add_argument(
        "--profile",
        metavar="FILE",
        help="measure what every kind of unit takes here first, and keep it in FILE",
    )
    costs.add_argument("--costs", metavar="FILE", help="take it from an earlier --profile")
    parser.add_argument("--json", metavar="FILE", help="write all plans to FILE")
    parser.add_argument(
        "--output", metavar="PICTURE", help="draw throughput and memory against m (.png, .svg)"
    )
    parser.add_argument(
        "--verify",
        metavar="FOLDER",
        help="then run the best plan, the runner-up and the best of other schedules, "
        f"{VERIFIED} in all, as a benchmark in FOLDER, parity included, and print predicted beside "
        "measured steps",
    )
    add_run_options(parser, without=(*DECIDED, *UNWEIGHED), preset="small")
    parser.refused = {flag(name): "plan decides this" for name in DECIDED}
    parser.refused |= {"--schedule": "plan decides this; --schedules limits the choice"}
    parser.refused |= {flag(name): "plan's time model does not know it" for name in UNWEIGHED}
    parser.set_defaults(run=_plan)


def read_size(text: str) -> float:
    """Read `32GB` as bytes. Raises ArgumentTypeError."""
    match = re.fullmatch(r"([0-9.]+) ?([a-zA-Z]*)", text)
    count = number(match[1]) if match else None
    factor = UNITS.get(match[2] or "B") if match else None
    if count is None or factor is None or count <= 0:
        what = f"expected a size such as 32GB, in one of {', '.join(UNITS)}"
        raise ArgumentTypeError(f"{text!r}; {what}")
    return count * factor


def _plan(arguments: argparse.Namespace) -> int:
    # Where shards are weighed, it is a wish for the plans that have some. A file's is refused: the
    # command of a plan without shards could not take it back.
    cuts = arguments.shards_allowed and getattr(arguments, "run.vocab_parallel", False)
    if cuts:
        delattr(arguments, "run.vocab_parallel")
    config = read_run(arguments, reads_text=bool(arguments.profile))
    config = config.model_copy(update={"vocab_parallel": cuts or config.vocab_parallel})
    named = arguments.schedules
    schedules = [] if named is None else chosen(named, WEIGHED, "--schedules")
    outputs = {
        option: file_to_write(path, f"--{option}")
        for option in ("json", "output", "profile")
        if (path := getattr(arguments, option))
    }
    if "output" in outputs and outputs["output"].suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--output {outputs['output']}: expected a picture, .png or .svg")
    if arguments.verify and not (arguments.profile or arguments.costs):
        raise UsageError("--verify: counted costs are no seconds; expected --profile or --costs")
    for axis, field in (("replicas", "replicas"), ("shards", "tensor_parallel")):
        if getattr(arguments, f"{axis}_allowed"):
            if arguments.link == float("inf"):
                raise UsageError(
                    f"--{axis}-allowed: their sums take the time of a link; expected --link SIZE"
                )
            if getattr(config, field) > 1:
                raise UsageError(f"--{axis}-allowed: --{flag(field)[2:]} is given; expected one")
    if (taken := config.replicas * config.tensor_parallel) > arguments.devices:
        raise UsageError(
            f"--devices {arguments.devices}: one stage takes replicas x tensor_parallel = {taken}; "
            "expected at least as many"
        )
    console = make_console()
    times = _times(arguments, config, outputs)
    times = times.model_copy(update={"link_bytes_per_second": arguments.link})
    say(console, f"costs: {printable(times.source)}")
    limit = arguments.memory_limit
    axes = arguments.replicas_allowed, arguments.shards_allowed
    plans = make_plans(config, arguments.devices, times, limit, schedules, *axes)
    if "json" in outputs:
        write_file(outputs["json"], json.dumps(as_data(plans), indent=1) + "\n")
    if "output" in outputs:
        shown.draw(outputs["output"], plans, limit)
    if not plans.found:
        if not plans.refused:
            raise UsageError("--schedules: none has a size for this model; expected others")
        say(console, f"nothing fits: {shown.missing(plans.refused[0])}")
        return EXIT_NOTHING_FITS
    shown.show(console, plans)
    say(console, f"run it: {command(arguments, plans.found[0].config)}")
    return _verify(arguments, plans, console) if arguments.verify else EXIT_OK


def _verify(arguments: argparse.Namespace, plans: Plans, console: Console) -> int:
    """Run the best plans and print what was predicted beside it."""
    # The best plan, the runner-up, which may be of the same schedule, and the best of the others.
    top = plans.found[:2]
    others = best_per_schedule(plans.found)
    for plan in top:
        others.pop(plan.config.schedule, None)
    best = [*top, *others.values()][:VERIFIED]
    out = Path(arguments.verify)
    before = set(out.iterdir()) if out.is_dir() else set()
    options = BenchOptions(out=arguments.verify, preset=getattr(arguments, "bench.preset", "small"))
    points = tuple(plan.config for plan in best)
    status = run_bench(Bench(options, points), arguments.command, console)
    results = collect(sorted(set(out.iterdir()) - before)).results
    console.print(shown.verified(best, results))
    return status


def _say_measured(runs: Sequence[RunConfig]) -> None:
    """Say what a profile does next: all of it takes minutes."""
    names = " and ".join(dict.fromkeys(run.schedule for run in runs))
    what = f"profile: {len(runs)} runs of {names}, stages = {runs[0].stages}"
    print(what, file=sys.stderr, flush=True)


def _times(arguments: argparse.Namespace, config: RunConfig, outputs: dict[str, Path]) -> UnitTimes:
    if arguments.costs:
        path = Path(arguments.costs)
        try:
            found = Profile.read(path)
        except UsageError as error:
            raise UsageError(f"--costs {error}") from None
        if difference := found.difference(config, arguments.devices):
            raise UsageError(f"--costs {path}: is of {difference}")
        return found.times
    if "profile" in outputs:
        made = profile(config, arguments.devices, on_worker=_say_measured)
        made.write(outputs["profile"])
        return made.times
    return counted_times(config, COUNTED_FLOPS)


def as_data(plans: Plans) -> dict[str, Any]:
    """Return all plans, the fastest first, and of what did not fit the nearest, for JSON."""
    return {
        "plans": [
            {
                "config": plan.config.model_dump(mode="json"),
                "step_seconds": plan.step_seconds,
                "tokens_per_second": plan.tokens_per_second,
                "bubble_fraction": plan.bubble_fraction,
                "model_flops_per_token": model_flops_per_token(plan.config),
                "model_flops_per_second_per_device": plan.model_flops_per_device,
                "mfu": plan.mfu,
                "memory": [vars(each) | {"total_bytes": each.total_bytes} for each in plan.memory],
            }
            for plan in plans.found
        ],
        "refused": [
            {"config": r.config.model_dump(mode="json")}
            | {"device": r.device, "missing_bytes": r.missing_bytes, "count": r.count}
            for r in plans.refused
        ],
    }


def command(arguments: argparse.Namespace, config: RunConfig) -> str:
    """Return the command that runs the plan, with the model and training that the user named."""
    words = ["triptych", "train"]
    if arguments.config is not None:
        words += ["--config", arguments.config]
    elif not hasattr(arguments, "bench.preset"):
        words += ["--preset", "small"]
    for path in arguments.python:
        words += ["--python", path]
    for dest, value in vars(arguments).items():
        if name := dest.partition(".")[2]:
            option = flag(name)
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            else:
                words += [option, *(value if isinstance(value, list) else [str(value)])]
    decided: dict[str, Any] = {
        "stages": config.stages,
        "schedule": config.schedule,
        "chunks": config.chunks,
        "micro-batches": config.train.micro_batches,
        "recompute": config.recompute,
    }
    if arguments.replicas_allowed and config.replicas > 1:
        decided["replicas"] = config.replicas
    if arguments.shards_allowed and config.tensor_parallel > 1:
        decided["tensor-parallel"] = config.tensor_parallel
        words += ["--vocab-parallel"] * config.vocab_parallel
    if config.partition:
        decided["partition"] = ",".join(map(str, config.partition))
    for name, value in decided.items():
        words += [f"--{name}", str(value)]
    return shlex.join(words)
