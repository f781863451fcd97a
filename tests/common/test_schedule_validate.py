"""The validator: one broken schedule per rule, all violations at once, circles shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.schedule.action import Schedule, ScheduleError, parse_schedule
from common.schedule.generators import make_schedule
from common.schedule.table import tabulate
from common.schedule.validate import (
    MAX_MISSING_LISTED,
    Rule,
    Violation,
    require_valid,
    validate,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def rules(violations: list[Violation]) -> set[Rule]:
    return {violation.rule for violation in violations}


def places(violations: list[Violation], rule: Rule) -> set[tuple[int, str]]:
    return {(v.device, v.action) for v in violations if v.rule is rule}


BROKEN = [
    # (rule, schedule, the places where this rule is broken, the other rules that break along with
    # it)
    (
        Rule.UNKNOWN_ACTION,
        "# schedule: x micro_batches=1\nF0 BW0 F7",
        {(0, "F7")},
        {Rule.ACTION_COUNT},
    ),
    (
        Rule.UNKNOWN_ACTION,
        "# schedule: x micro_batches=1 chunks=1\nF0 BW0 BW0.3",
        {(0, "BW0.3")},
        {Rule.ACTION_COUNT},
    ),
    (Rule.MISSING_ACTION, "F0 B0 W0\nF0 B0", {(1, "W0")}, {Rule.ACTION_COUNT}),
    (Rule.REPEATED_ACTION, "F0 F0 BW0", {(0, "F0")}, {Rule.ACTION_COUNT}),
    (Rule.REPEATED_ACTION, "F0 B0 W0 BW0", {(0, "BW0")}, {Rule.ACTION_COUNT}),
    (Rule.REPEATED_ACTION, "F0 BW0 W0", {(0, "W0")}, {Rule.ACTION_COUNT}),
    (Rule.ACTION_COUNT, "F0 F1 BW0 BW1\nF0 BW0 F1 BW1 F1", {(1, "")}, {Rule.REPEATED_ACTION}),
    (
        Rule.FORWARD_BEFORE_INPUT,
        "# schedule: x micro_batches=1 chunks=2\nF0.1 F0 BW0.1 BW0",
        {(0, "F0.1")},
        set(),
    ),
    (Rule.BACKWARD_BEFORE_FORWARD, "BW0 F0", {(0, "BW0")}, set()),
    (
        Rule.BACKWARD_BEFORE_NEXT_STAGE,
        "# schedule: x micro_batches=1 chunks=2 placement=vee\nF0 F0.1 BW0 BW0.1",
        {(0, "BW0")},
        set(),
    ),
    (Rule.WEIGHT_BEFORE_BACKWARD, "F0 W0 B0", {(0, "W0")}, set()),
    (
        Rule.RECEIVE_WITHOUT_SEND,
        "BW0\nF0 BW0",
        {(1, "F0")},
        {Rule.MISSING_ACTION, Rule.ACTION_COUNT, Rule.BACKWARD_BEFORE_FORWARD},
    ),
    (Rule.DEADLOCK, "F0 BW0 F1 BW1\nF0 F1 BW0 BW1", {(0, "BW0")}, set()),
]


@pytest.mark.parametrize(
    ("rule", "text", "where", "others"), BROKEN, ids=[f"{b[0]}-{n}" for n, b in enumerate(BROKEN)]
)
def test_every_rule_is_reported_by_name_and_place(
    rule: Rule, text: str, where: set[tuple[int, str]], others: set[Rule]
) -> None:
    violations = validate(parse_schedule(text))
    assert places(violations, rule) == where
    assert rules(violations) == {rule} | others


def test_every_rule_has_a_broken_schedule() -> None:
    assert {rule for rule, *_ in BROKEN} == set(Rule)


def test_a_deadlock_is_shown_as_a_circle() -> None:
    (violation,) = validate(parse_schedule("F0 BW0 F1 BW1\nF0 F1 BW0 BW1"))
    assert str(violation) == (
        "[deadlock] device 0, action 1 (BW0): a circle of 2: device 0 at action 1 (BW0) waits for "
        "BW0 of device 1; device 1 at action 1 (F1) waits for F1 of device 0"
    )


def test_two_circles_are_two_violations() -> None:
    # Devices 0 and 1 wait for one another, and so do devices 2 and 3.
    text = "F0 BW0 F1 BW1\nF0 F1 BW0 BW1\nF0 BW0 F1 BW1\nF0 F1 BW0 BW1"
    assert [(v.rule, v.device) for v in validate(parse_schedule(text))] == [
        (Rule.DEADLOCK, 0),
        (Rule.DEADLOCK, 2),
    ]


def test_all_violations_are_reported_at_once() -> None:
    violations = validate(
        parse_schedule("# schedule: x micro_batches=2\nBW0 F0 F9\nF0 F0 W1 B1 F1")
    )
    assert rules(violations) >= {
        Rule.BACKWARD_BEFORE_FORWARD,
        Rule.UNKNOWN_ACTION,
        Rule.MISSING_ACTION,
        Rule.REPEATED_ACTION,
        Rule.WEIGHT_BEFORE_BACKWARD,
        Rule.ACTION_COUNT,
        Rule.RECEIVE_WITHOUT_SEND,
    }
    with pytest.raises(ScheduleError, match=rf"breaks {len(violations)} rules"):
        require_valid(parse_schedule("# schedule: x micro_batches=2\nBW0 F0 F9\nF0 F0 W1 B1 F1"))


def test_what_a_file_announces_and_lacks_is_counted_not_listed() -> None:
    violations = validate(parse_schedule("# schedule: x micro_batches=100 chunks=10000\nF0 BW0"))
    missing = [
        violation.message for violation in violations if violation.rule is Rule.MISSING_ACTION
    ]
    assert len(missing) == MAX_MISSING_LISTED + 1
    assert (
        sum(
            message.endswith(f" and {3 * 10**6 - 4 - MAX_MISSING_LISTED} more are missing")
            for message in missing
        )
        == 1
    )


def test_swapping_any_dependent_neighbours_is_noticed() -> None:
    schedule = make_schedule("zb-h1", 3, 4)
    rows = [list(row) for row in schedule.devices]
    for device, row in enumerate(rows):
        for n in range(len(row) - 1):
            a, b = row[n], row[n + 1]
            if a.micro_batch == b.micro_batch:
                text = "\n".join(
                    " ".join(map(str, [*r[:n], b, a, *r[n + 2 :]] if d == device else r))
                    for d, r in enumerate(rows)
                )
                assert validate(parse_schedule(text)), f"device {device}: {a} and {b} swapped"


def read_chart(text: str) -> tuple[Schedule, dict[tuple[int, str], tuple[int, int]]]:
    """The schedule of a Markdown chart, a row per unit of time and a column per device, and when
    each action starts and ends.
    """
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    times: dict[tuple[int, str], tuple[int, int]] = {}
    for time, *cells in rows[2:]:
        for device, action in enumerate(cells):
            if action:
                start, _ = times.get((device, action), (int(time), 0))
                times[device, action] = (start, int(time) + 1)
    devices = [[a for d, a in times if d == device] for device in range(len(rows[0]) - 1)]
    return parse_schedule("\n".join(" ".join(actions) for actions in devices)), times


def too_early(text: str) -> set[tuple[int, str]]:
    """What starts in the chart before the action of another device that it needs has ended."""
    schedule, times = read_chart(text)
    rows = sorted(times.items(), key=lambda timed: timed[0][0])  # as the table has them
    return {
        place
        for (place, (start, _)), source in zip(rows, tabulate(schedule).source, strict=True)
        if source >= 0 and rows[source][1][1] > start
    }


def test_the_published_impossible_chart_is_rejected_for_the_right_reasons() -> None:
    text = (GOLDEN / "impossible_1f1b.md").read_text()
    # Device 1 runs every backward before device 2 has run it.
    assert too_early(text) == {(1, "B1"), (1, "B2"), (1, "B3"), (1, "B4")}
    violations = validate(read_chart(text)[0])
    # Device 3 never runs the forwards 2, 3 and 4, and still differentiates them.
    assert places(violations, Rule.MISSING_ACTION) == {(3, "F2"), (3, "F3"), (3, "F4")}
    assert places(violations, Rule.BACKWARD_BEFORE_FORWARD) == {(3, "BW2"), (3, "BW3"), (3, "BW4")}
    assert places(violations, Rule.ACTION_COUNT) == {(3, "")}
    assert len(violations) == 7


def test_a_possible_chart_passes() -> None:
    text = "|t|a|b|\n|-|-|-|\n|0|F1||\n|1||F1|\n|2||B1|\n|3||B1|\n|4|B1||\n"
    schedule, times = read_chart(text)
    assert times[1, "B1"] == (2, 4)
    assert not validate(schedule) and not too_early(text)
    assert too_early(text.replace("|3||B1|", "|3|B1|B1|")) == {(0, "B1")}
