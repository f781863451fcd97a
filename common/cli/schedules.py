"""The subcommands about schedules: draw, simulate, validate."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table as RichTable

from common.cli.numbers import natural, number_that, positive
from common.io.bounded import read_stream, read_text
from common.io.console import make_console, say
from common.io.edges import number, printable, write_file
from common.io.usage import UsageError
from common.report.plan import size as size_in_words
from common.schedule.action import Op, Schedule, ScheduleError, format_schedule, require_size
from common.schedule.bound import lower_bound
from common.schedule.controllable import why_not_v_min
from common.schedule.draw import draw_color, draw_text
from common.schedule.formulas import textbook
from common.schedule.generators import GENERATORS, SEARCH, default_chunks, make_schedule
from common.schedule.interleaved import interleaved
from common.schedule.pytorch_csv import format_csv, read_schedule
from common.schedule.recompute import WORDS
from common.schedule.search import ACTIONS_TO_TRY, CHUNKS, limits, search, shops
from common.schedule.shop import Objective
from common.schedule.simulate import (
    Costs,
    Simulation,
    WrapAround,
    per_stage,
    per_virtual_stage,
    simulate,
)
from common.schedule.table import OP_CODE, tabulate
from common.schedule.validate import validate
from common.schedule.why import explain_gaps
from common.spec.rules import why_no_mesh
from common.spec.run import PRESETS, RunConfig, explain, preset
from common.spec.traffic import between_hosts, blocks, traffic_bytes

EXIT_VIOLATIONS = 1
SHARE = number_that(lambda share: 0 <= share <= 1, "a share, 0 to 1")
INTERLEAVED = "interleaved"
MEMORY_LIMIT = (2.0,)
MAX_PAIRS = 1_000_000
"""Of processes that send each other gradients: a second or two."""
# Options of one schedule; where several are compared, of that one among them.
OPTIONS_OF = {
    SEARCH: ("memory_limit", "objective", "effort", "seed"),
    INTERLEAVED: ("group_size", "warm_up"),
}
COST_OPTIONS = (
    *("forward", "backward_input", "backward_weight", "communication"),
    *("transmission", "activation_bytes", "overlap"),
)
PER_MESSAGE = ("communication", "transmission")
"""A chunk's message is as large as a stage's."""
PUBLISHED_WRAP_AROUND: WrapAround = "first"
"""Of `simulate`, so that its figures are those of the published tables; a run's stand beside."""

_Numbers = tuple[float, ...]


def register(subcommands: Any) -> None:
    """Add the subcommands to argparse's subparsers."""
    draw = subcommands.add_parser("draw")
    _add_schedule(draw, "{} or file:PATH")
    add_costs(draw, memory=False)
    draw.add_argument(
        "--output",
        metavar="FILE",
        help="write to FILE: .png, .svg, .txt, .json (a Chrome trace) or .csv "
        "(the schedule for torch.distributed.pipelining)",
    )
    draw.add_argument(
        "--why",
        action="store_true",
        help="mark the critical path and say what every idle gap waits for",
    )
    draw.set_defaults(run=_draw)

    simulator = subcommands.add_parser("simulate")
    _add_schedule(simulator, "{} or file:PATH; a comma list, or all, to see them side by side")
    add_costs(simulator)
    simulator.add_argument(
        "--output",
        metavar="FILE",
        help="write the schedule to FILE: .csv for torch.distributed.pipelining, else in text form",
    )
    simulator.add_argument("--json", action="store_true", help="print JSON")
    simulator.add_argument(
        "--formulas",
        action="store_true",
        help="print the textbook's formulas beside the simulation",
    )
    several = simulator.add_argument_group("what travels in a step, in bytes, over several hosts")
    several.add_argument("--hosts", metavar="H", type=positive, help="hosts of equal size")
    several.add_argument("--replicas", metavar="D", type=positive, help="pipelines (default 1)")
    several.add_argument(
        "--tensor-parallel", metavar="T", type=positive, help="shards of every stage (default 1)"
    )
    several.add_argument(
        "--preset", choices=PRESETS, default="small", help="the model (default small)"
    )
    simulator.set_defaults(run=_simulate)

    validator = subcommands.add_parser("validate")
    validator.add_argument("file", metavar="FILE", help="the schedule; - reads standard input")
    validator.set_defaults(run=_validate)


def _add_schedule(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "word",
        metavar="S",
        nargs="?",
        type=_word,
        help="a schedule's name or file; - reads standard input",
    )
    parser.add_argument("--schedule", metavar="S", help=what.format(", ".join(GENERATORS)))
    add_size(parser)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large a named schedule is."""
    for option, metavar, kind, text in (
        ("--stages", "P", positive, "devices in the pipeline; a file says it itself"),
        ("--micro-batches", "M", positive, "of one optimizer step; a file says it itself"),
        (
            *("--chunks", "V", positive),
            "model chunks per device (the interleaved ones; default 2); search: at most so many",
        ),
        (
            *("--group-size", "N", positive),
            "interleaved: micro-batches that go through one chunk before the next one's turn "
            "(Megatron-LM's microbatch-group-size-per-vp-stage; default: stages, or a few more)",
        ),
        (
            *("--memory-limit", "X", _numbers),
            "search: activations held at most, in units of 1f1b's peak; one number, or one per "
            "stage (default 2.0)",
        ),
        (
            *("--effort", "X", number_that(lambda x: x > 0, "a number above 0")),
            "search: twice as much may take twice as long, and find a better one (default 1: some "
            "seconds); never a matter of the clock, so the same on every machine",
        ),
        ("--seed", "N", natural, "search: another one tries other changes"),
    ):
        parser.add_argument(option, type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--warm-up",
        choices=("full", "short", "auto"),
        help="interleaved: full is Megatron-LM's; short runs stages - 1 - d forwards less on "
        "device d and holds less, but waits for every message; auto is short where that takes no "
        "longer with these costs (default full)",
    )
    parser.add_argument(
        "--objective",
        choices=("plain", "warm"),
        help="search: what is to be short, the plain step, or with a warm start the longest time "
        "from a stage's first forward to its last action (default plain)",
    )


def add_costs(parser: argparse.ArgumentParser, memory: bool = True) -> None:
    """Add the options for the costs, with `memory` those for bytes too."""
    costs = parser.add_argument_group(
        "costs",
        "of one micro-batch on a whole stage, in any one unit; one number, or a comma list with "
        "one per stage, or one per virtual stage in the order of the model",
    )
    for option, metavar, kind, default, text in (
        ("--forward", "X", _numbers, (1.0,), None),
        ("--backward-input", "X", _numbers, (1.0,), None),
        ("--backward-weight", "X", _numbers, (1.0,), None),
        ("--communication", "X", _numbers, (0.0,), "of every hop (default 0)"),
        (
            *("--transmission", "X", _numbers, None),
            "of every hop besides, one message of a stage after the other: what a link of limited "
            "bandwidth takes (default 0)",
        ),
        (
            *("--overlap", "X", _numbers, None),
            "of a forward and a backward that overlap (default: what they take one after another)",
        ),
        (
            *("--kept-for-weight", "SHARE", SHARE, Costs.kept_by_backward_input),
            "of an activation, that B leaves held until W: 0 to 1 (default %(default)s)",
        ),
        (
            *("--kept-for-recompute", "SHARE", SHARE, None),
            "of an activation, that F leaves held where B computes it again, its input: 0 to 1 "
            f"(default {Costs.kept_by_forward})",
        ),
    ):
        costs.add_argument(option, metavar=metavar, type=kind, default=default, help=text)
    costs.add_argument(
        "--recompute",
        default=Costs.recompute,
        metavar=WORDS,
        help="what a backward computes again instead of holding it; it then takes the forward's "
        "time as well",
    )
    if memory:
        text = "adds the peak memory in bytes"
        costs.add_argument("--activation-bytes", type=_numbers, metavar="X", help=text)


def _numbers(text: str) -> _Numbers:
    found = tuple(number(word) for word in text.split(","))
    # Far below the largest float: sums and products of many stay finite.
    if any(each is None or not 0 <= each <= 1e100 for each in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number or a comma list of numbers, 0 to 1e100"
        )
    return tuple(each or 0.0 for each in found)


def _word(text: str) -> str:
    """Return `file:PATH` for what looks like a path or is one; what is left is a name, or wrong."""
    is_path = text == "-" or "/" in text or "." in text or (text != "" and Path(text).exists())
    is_known = text.startswith("file:") or set(text.split(",")) <= {*GENERATORS, "all"}
    return f"file:{text}" if is_path and not is_known else text


def _name_schedule(arguments: argparse.Namespace) -> None:
    """Let `schedule` be what is named, by option or without. Raises UsageError."""
    # argparse's own group of the two would hide which option is unknown.
    if (arguments.word is None) == (arguments.schedule is None):
        raise UsageError("expected one schedule: a name, a file, or --schedule S")
    arguments.schedule = arguments.word or arguments.schedule


def _costs(arguments: argparse.Namespace, stages: int, schedule: Schedule | None = None) -> Costs:
    """The costs of so many stages, or of the schedule's virtual stages if given for these."""
    if arguments.kept_for_recompute is not None and arguments.recompute == "none":
        raise ScheduleError(
            "--kept-for-recompute: nothing is computed again; expected with --recompute"
        )
    # Of 2 stages with 2 chunks: 1 number for all, 2 for the stages, or 4 for the virtual stages.
    virtual_stages = (
        schedule.num_virtual_stages if schedule is not None and schedule.num_chunks > 1 else None
    )
    found = {
        option: per_stage(values, stages, "--" + option.replace("_", "-"), virtual_stages)
        for option in COST_OPTIONS
        if (values := getattr(arguments, option, None)) is not None
    }
    if schedule is not None and any(len(values) > stages for values in found.values()):
        found = {
            option: per_virtual_stage(values, schedule, shared=option not in PER_MESSAGE)
            for option, values in found.items()
        }
    sizes = found.pop("activation_bytes", None)
    return Costs(
        **found,
        activation_bytes=None if sizes is None else tuple(map(round, sizes)),
        kept_by_backward_input=arguments.kept_for_weight,
        recompute=arguments.recompute,
        kept_by_forward=arguments.kept_for_recompute or Costs.kept_by_forward,
    )


def _size(arguments: argparse.Namespace) -> tuple[int, int]:
    if arguments.stages is None or arguments.micro_batches is None:
        raise ScheduleError(
            "--stages and --micro-batches are needed; only a schedule in a file says them itself"
        )
    require_size(arguments.stages, arguments.micro_batches, 1)
    return arguments.stages, arguments.micro_batches


def plan(name: str, arguments: argparse.Namespace) -> tuple[Schedule, Costs]:
    """Return the named schedule and the costs for it."""
    for owner, options in OPTIONS_OF.items():
        for option in options:
            if getattr(arguments, option) is not None and name != owner:
                raise ScheduleError(
                    f"--{option.replace('_', '-')}: only schedule {owner} has it, not {name}"
                )
    if name.startswith("file:"):
        schedule = _read_schedule(name.removeprefix("file:"))
        sizes = {"stages": schedule.num_devices, "micro_batches": schedule.num_micro_batches}
        for option, has in (sizes | {"chunks": schedule.num_chunks}).items():
            asked = getattr(arguments, option)
            if asked not in (None, has):
                raise ScheduleError(
                    f"--{option.replace('_', '-')} {asked}; the schedule in the file has {has}"
                )
        return schedule, _costs(arguments, schedule.num_devices, schedule)
    stages, micro_batches = _size(arguments)
    if name == SEARCH and min(stages, micro_batches) > 0:
        if arguments.recompute != Costs.recompute:
            raise ScheduleError(
                f"schedule {SEARCH} does not plan for --recompute; expected a larger "
                "--backward-input"
            )
        costs = _costs(arguments, stages)
        found = search(
            *_question(arguments, costs),
            actions_to_try=round((arguments.effort or 1.0) * ACTIONS_TO_TRY),
            seed=arguments.seed or 0,
        )
        return found, costs
    chunks = default_chunks(name) if arguments.chunks is None else arguments.chunks
    schedule = make_schedule(name, stages, micro_batches, chunks)
    costs = _costs(arguments, stages, schedule)
    if name == INTERLEAVED:
        schedule = _interleaved(stages, micro_batches, chunks, costs, arguments)
    if (make := GENERATORS[name].for_costs) is not None:
        schedule = make(stages, micro_batches, costs)
    return schedule, costs


def _question(
    arguments: argparse.Namespace, costs: Costs
) -> tuple[int, int, Costs, list[float], Sequence[int], Objective]:
    """What `search` and `shops` ask for."""
    p, m = _size(arguments)
    most = limits(p, m, arguments.memory_limit or MEMORY_LIMIT)
    chunks = range(1, (arguments.chunks or max(CHUNKS)) + 1)
    return p, m, costs, most, chunks, arguments.objective or "plain"


def _interleaved(p: int, m: int, v: int, costs: Costs, arguments: argparse.Namespace) -> Schedule:
    """The schedule with the groups and the warm-up that the options ask for."""
    warm_up = arguments.warm_up or "full"
    full, short = (interleaved(p, m, v, arguments.group_size, each) for each in (False, True))
    if warm_up == "auto":
        takes = [simulate(each, costs).makespan for each in (full, short)]
        warm_up = "short" if takes[1] <= takes[0] * (1 + 1e-9) else "full"
    return short if warm_up == "short" else full


def _read_schedule(path: str) -> Schedule:
    name = printable(Path(path).stem)
    try:
        if path == "-":
            name, text = "standard input", read_stream(sys.stdin.buffer, "standard input")
        else:
            text = read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(f"{path}: {why}; expected a readable text file") from None
    return read_schedule(text, name)


def _draw(arguments: argparse.Namespace) -> int:
    _name_schedule(arguments)
    schedule, costs = plan(arguments.schedule, arguments)
    _note_v_min(schedule, costs)
    _check_overlap([schedule], arguments)
    why = arguments.why
    if arguments.output is None:
        show_chart(schedule, costs, why)
    else:
        _write_chart(schedule, costs, Path(arguments.output), why)
    if why:
        print(explain_gaps(simulate(schedule, costs)))
    return 0


def show_chart(schedule: Schedule, costs: Costs, why: bool = False) -> None:
    """Print the chart, in colour on a terminal."""
    console = make_console()
    ascii_only = console.options.ascii_only
    if console.is_terminal:
        console.print(draw_color(schedule, costs, console.width, ascii_only, why), end="")
    else:
        print(draw_text(schedule, costs, ascii_only=ascii_only, why=why))


def _write_chart(schedule: Schedule, costs: Costs, path: Path, why: bool) -> None:
    suffix = path.suffix.lower()
    if why and suffix in (".csv", ".json"):
        raise ScheduleError(f"--why: {suffix} marks no path; expected .png, .svg or .txt")
    match suffix:
        case ".txt":
            write_file(path, draw_text(schedule, costs, why=why) + "\n")
        case ".csv":
            write_file(path, format_csv(schedule))
        case ".json":
            from common.schedule.trace import chrome_trace

            write_file(path, json.dumps(chrome_trace(simulate(schedule, costs))))
        case ".png" | ".svg":
            # Imported late: the other subcommands should not wait for matplotlib.
            from common.schedule.picture import draw_picture

            draw_picture(simulate(schedule, costs), path, why)
        case _:
            raise ScheduleError(
                f"--output {path}: {suffix or 'no suffix'}; expected .png, .svg, .txt, .json or "
                ".csv"
            )


def _simulate(arguments: argparse.Namespace) -> int:
    _name_schedule(arguments)
    if names := _several(arguments):
        if _is_mesh(arguments):
            what = "--hosts, --replicas, --tensor-parallel: of one schedule; expected one name"
            raise UsageError(what)
        return _side_by_side(arguments, names)
    schedule, costs = plan(arguments.schedule, arguments)
    _check_overlap([schedule], arguments)
    simulation = _simulated(schedule, costs)
    if arguments.formulas and simulation.makespan == 0:
        raise UsageError("--formulas: every cost is 0; expected one above it")
    result = _result(simulation, arguments)
    if _is_mesh(arguments):
        result["bytes_per_step"] = _links(schedule, arguments)
    compared = textbook(simulation) if arguments.formulas else []
    if compared and arguments.json:
        result["formulas"] = [vars(each) | {"verdict": each.verdict} for each in compared]
    if arguments.output is not None:
        path = Path(arguments.output)
        is_csv = path.suffix.lower() == ".csv"
        write_file(path, format_csv(schedule) if is_csv else format_schedule(schedule))
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    links = result.pop("bytes_per_step", {})
    for key, value in result.items():
        shown = ", ".join(map(_short, value)) if isinstance(value, list) else _short(value)
        print(f"{key.replace('_', ' '):34}{shown}")
    for each in compared:
        print(
            f"{each.name:12}{each.formula:36}= {each.value:<10.6g} simulated "
            f"{each.simulated:<10.6g} {each.verdict}"
        )
    for link, count in links.items():
        print(f"{link:34}{size_in_words(count)} a step")
    return 0


def _is_mesh(arguments: argparse.Namespace) -> bool:
    return bool(arguments.hosts or arguments.replicas or arguments.tensor_parallel)


def _links(schedule: Schedule, arguments: argparse.Namespace) -> dict[str, int]:
    """What the preset's model sends, by link: within a host, and from host to host."""
    base = preset(arguments.preset)
    hosts, replicas = arguments.hosts or 1, arguments.replicas or 1
    shards = arguments.tensor_parallel or 1
    if why := why_no_mesh(
        base.model_copy(update={"framework": "torch", "tensor_parallel": shards})
    ):
        raise UsageError(f"--preset {arguments.preset}: {why}")
    m, size = schedule.num_micro_batches, schedule.num_devices * replicas * shards
    if size % hosts:
        axes = f"{replicas} x {schedule.num_devices} stages" + f" x {shards} shards" * (shards > 1)
        raise UsageError(
            f"--hosts {hosts}: does not divide the {size} processes of {axes}; expected a divisor "
            f"of {size}"
        )
    if size * replicas > MAX_PAIRS:
        most = math.isqrt(MAX_PAIRS // schedule.num_devices // shards)
        raise UsageError(f"--replicas {replicas}: too many to list; expected at most {most}")
    # A sequence for each micro-batch at least: what travels needs no more of the training.
    sequences = max(base.train.batch_size, replicas * m)
    train = base.train.model_dump() | {"batch_size": sequences, "micro_batches": m}
    run: dict[str, Any] = {"stages": schedule.num_devices, "chunks": schedule.num_chunks}
    run |= {"replicas": replicas, "train": train, "schedule": schedule.name}
    run |= {"framework": "torch", "tensor_parallel": shards}  # a process for every shard
    try:
        config = RunConfig.model_validate(base.model_dump() | run)
    except ValidationError as error:
        raise UsageError(f"--preset {arguments.preset}: {explain(error).splitlines()[0]}") from None
    sent = traffic_bytes(config, schedule)
    links = between_hosts(sent, blocks(size, hosts))
    return {a if a == b else f"{a} to {b}": links[a, b] for a, b in sorted(links)}


def _several(arguments: argparse.Namespace) -> list[str]:
    """The schedules to show side by side; none for one alone, whose file's name may have commas."""
    text = str(arguments.schedule)
    if text == "all":
        return [
            name for name in GENERATORS if name != SEARCH or arguments.recompute == Costs.recompute
        ]
    return [] if "," not in text or Path(text.removeprefix("file:")).exists() else text.split(",")


def _check_overlap(schedules: Sequence[Schedule], arguments: argparse.Namespace) -> None:
    if arguments.overlap is not None and not any(tabulate(s).overlaps.any() for s in schedules):
        raise ScheduleError(
            f"--overlap: nothing overlaps in {', '.join(s.name for s in schedules)}; expected a "
            "schedule with pairs such as (F1&BW0)"
        )


def _note_v_min(schedule: Schedule, costs: Costs) -> None:
    if schedule.name == "v-min" and (why := why_not_v_min(schedule, costs)) is not None:
        print(f"note: {why}", file=sys.stderr)


def _simulated(schedule: Schedule, costs: Costs) -> Simulation:
    _note_v_min(schedule, costs)
    # The search counts every message, as a run does.
    rule: WrapAround = "every" if schedule.name == SEARCH else PUBLISHED_WRAP_AROUND
    return simulate(schedule, costs, wrap_around=rule)


def _result(simulation: Simulation, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of `simulate`, by its JSON keys."""
    schedule, costs = simulation.schedule, simulation.costs
    result: dict[str, Any] = {
        "schedule": schedule.name,
        "stages": schedule.num_devices,
        "micro_batches": schedule.num_micro_batches,
        "chunks": schedule.num_chunks,
        "recompute": costs.recompute,
        "makespan": simulation.makespan,
        "bubble_fraction": simulation.bubble_fraction,
        "bubble_fraction_per_stage": simulation.bubble_fraction_per_stage,
        "warm_start_bubble_fraction": simulation.warm_start_bubble_fraction,
        "peak_in_flight_per_stage": [_whole(peak) for peak in simulation.peak_in_flight_per_stage],
        "peak_memory_per_stage": [_whole(peak) for peak in simulation.peak_memory_per_stage],
    }
    if schedule.num_chunks > 1:
        result["peak_chunks_in_flight_per_stage"] = simulation.peak_chunks_in_flight_per_stage
    if simulation.peak_bytes_per_stage is not None:
        result["peak_bytes_per_stage"] = simulation.peak_bytes_per_stage
    trusts = schedule.name != SEARCH and simulation.table.trusted_wrap_arounds.any()
    if trusts and max(costs.message) > 0:
        every = simulate(schedule, costs, check=False)
        result["wrap_around"] = PUBLISHED_WRAP_AROUND
        result["bubble_fraction_every_wrap_around"] = every.bubble_fraction
    if arguments.schedule == SEARCH:
        question = _question(arguments, costs)
        bound = min(map(lower_bound, shops(*question)))
        # A step is no shorter than `bound` in any order, and in it the devices work for `busy`.
        busy = float(costs.per_micro_batch.mean()) * schedule.num_micro_batches
        result["memory_limit_per_stage"] = [_whole(each) for each in question[3]]
        prefix = "warm_start_" if arguments.objective == "warm" else ""
        result[f"{prefix}bubble_fraction_bound"] = 1 - busy / bound if bound else 0.0
    return result


def _whole(number: float) -> float | int:
    return round(number) if abs(number - round(number)) < 1e-9 else number


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _validate(arguments: argparse.Namespace) -> int:
    schedule = _read_schedule(arguments.file)
    violations = validate(schedule)
    for violation in violations:
        print(violation)
    what = (
        f"{schedule.num_devices} devices, {schedule.num_micro_batches} micro-batches, "
        f"{schedule.num_actions} actions"
    )
    if violations:
        print(f"not valid: {len(violations)} violations ({what})")
        return EXIT_VIOLATIONS
    print(f"valid: {what}")
    if not _adds_in_order(schedule):
        why = "adds weight gradients out of micro-batch order"
        print(f"note: a device {why}, so their last bits differ from 1f1b's")
    return 0


def _adds_in_order(schedule: Schedule) -> bool:
    """Return whether every chunk's W and BW keep the micro-batches' order, as equal bits need."""
    table = tabulate(schedule)
    adds = (table.op == OP_CODE[Op.W]) | (table.op == OP_CODE[Op.BW])
    for chunk in range(schedule.num_chunks):
        for device in range(schedule.num_devices):
            of = adds & (table.chunk == chunk) & (table.device == device)
            if (table.micro_batch[of][1:] < table.micro_batch[of][:-1]).any():
                return False
    return True


def _side_by_side(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    for option in ("output", "formulas"):
        if getattr(arguments, option):
            raise ScheduleError(f"--{option}: takes one schedule, not {len(names)}")
    has_own = [name in GENERATORS and GENERATORS[name].chunks is not None for name in names]
    if arguments.chunks is not None and all(has_own):
        what = f"{', '.join(names)} cannot choose; expected with {INTERLEAVED}"
        raise ScheduleError(f"--chunks {arguments.chunks}: {what}")
    planned = []
    left_out: dict[str, ScheduleError] = {}
    for name in names:
        alone = argparse.Namespace(**vars(arguments) | {"schedule": name})
        fixed = GENERATORS[name].chunks if name in GENERATORS else None
        # --chunks is meant for those that can have any number of them.
        alone.chunks = fixed if fixed is not None else arguments.chunks
        for owner, options in OPTIONS_OF.items():
            if owner in names and name != owner:
                vars(alone).update(dict.fromkeys(options))
        try:
            planned.append((*plan(name, alone), alone))
        except ScheduleError as error:
            if arguments.schedule != "all":
                raise
            left_out[name] = error
    if not planned:
        raise next(iter(left_out.values()))
    if left_out:
        reasons = "; ".join(f"{name} ({error})" for name, error in left_out.items())
        print(f"left out: {reasons}", file=sys.stderr)
    _check_overlap([schedule for schedule, _, _ in planned], arguments)
    results = [_result(_simulated(schedule, costs), alone) for schedule, costs, alone in planned]
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    titles = "schedule,chunks,bubble,warm-start bubble,makespan,peak in flight,peak memory"
    table, console = RichTable(*titles.split(",")), make_console()
    for column in table.columns[1:]:
        column.justify = "right"
    for each in results:
        bubbles = (each["bubble_fraction"], each["warm_start_bubble_fraction"])
        peaks = (max(each["peak_in_flight_per_stage"]), max(each["peak_memory_per_stage"]))
        cells = [*(f"{x:.4f}" for x in bubbles), *(f"{x:g}" for x in (each["makespan"], *peaks))]
        table.add_row(each["schedule"], str(each["chunks"]), *cells)
    console.print(table)
    say(console, "Peaks: of the worst stage, in activations of one micro-batch on a whole stage.")
    for each in results:
        if every := each.get("bubble_fraction_every_wrap_around"):
            say(
                console,
                f"{each['schedule']}: by the published rule; a run's bubble is {every:.4f}.",
            )
    return 0
