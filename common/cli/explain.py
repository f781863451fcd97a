"""The subcommand explain: what a named schedule is, its formulas in numbers, and its chart."""

from __future__ import annotations

import argparse
from typing import Any

from common.cli.schedules import add_costs, add_size, plan, show_chart
from common.schedule.action import ScheduleError
from common.schedule.explain import EXPLANATIONS, explain
from common.schedule.generators import GENERATORS
from common.schedule.simulate import simulate

STAGES, MICRO_BATCHES = 4, 8
"""The size of the charts in docs/schedules.md."""


def register(subcommands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = subcommands.add_parser(
        "explain",
        description="What a schedule is, whose idea it is, what bubble and memory its formulas "
        "give and the simulator finds, and its chart.",
    )
    parser.add_argument("schedule", metavar="SCHEDULE", help=", ".join(EXPLANATIONS))
    add_size(parser)
    add_costs(parser, memory=False)
    parser.set_defaults(run=_explain, stages=STAGES, micro_batches=MICRO_BATCHES)


def _explain(arguments: argparse.Namespace) -> int:
    name = arguments.schedule
    if name not in GENERATORS:
        raise ScheduleError(
            f"{name} has no explanation; expected one of {', '.join(EXPLANATIONS)} (triptych draw "
            "--why takes files too)"
        )
    schedule, costs = plan(name, arguments)
    print(explain(name, simulate(schedule, costs)) + "\n")
    try:
        show_chart(schedule, costs)
    except ScheduleError as error:  # too large for text
        print(f"no chart: {error}")
    return 0
