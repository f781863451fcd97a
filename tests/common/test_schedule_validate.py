"""The validator: one broken schedule per rule, all violations at once, circles shown, charts with
times.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.schedule.action import ScheduleError, parse_schedule
from common.schedule.generators import make_schedule
from common.schedule.timetable import Timetable, read_table
from common.schedule.validate import (
    MAX_MISSING_LISTED,
    Rule,
    Violation,
    require_valid,
    validate,
    validate_timetable,
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
    assert {rule for rule, *_ in BROKEN} | {Rule.OVERLAP} == set(Rule)


def test_overlap_needs_times() -> None:
    table = read_table("0: F0@0-2 BW0@1-3")
    assert isinstance(table, Timetable)
    violations = validate_timetable(table)
    assert places(violations, Rule.OVERLAP) == {(0, "BW0")}
    assert places(violations, Rule.BACKWARD_BEFORE_FORWARD) == {(0, "BW0")}


def test_a_deadlock_is_shown_as_a_circle() -> None:
    (violation,) = validate(parse_schedule("F0 BW0 F1 BW1\nF0 F1 BW0 BW1"))
    assert str(violation) == (
        "[deadlock] device 0, action 1 (BW0): a circle of 2: device 0 at action 1 (BW0) waits for "
        "BW0 of device 1; "
        "device 1 at action 1 (F1) waits for F1 of device 0"
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


def test_the_published_impossible_chart_is_rejected_for_the_right_reasons() -> None:
    table = read_table((GOLDEN / "impossible_1f1b.md").read_text())
    assert isinstance(table, Timetable)
    violations = validate_timetable(table)
    # Device 1 runs every backward before device 2 has run it.
    early = places(violations, Rule.BACKWARD_BEFORE_NEXT_STAGE)
    assert early == {(1, "BW1"), (1, "BW2"), (1, "BW3"), (1, "BW4")}
    # Device 3 never runs the forwards 2, 3 and 4, and still differentiates them.
    assert places(violations, Rule.MISSING_ACTION) == {(3, "F2"), (3, "F3"), (3, "F4")}
    assert places(violations, Rule.BACKWARD_BEFORE_FORWARD) == {(3, "BW2"), (3, "BW3"), (3, "BW4")}
    assert places(violations, Rule.ACTION_COUNT) == {(3, "")}
    assert len(violations) == 11
    assert any("starts at 5, before BW1 of device 2 ends at 7" in str(v) for v in violations)


def test_a_possible_chart_passes_in_either_orientation_and_with_long_actions() -> None:
    chart = """
| t | a | b |
|---|---|---|
| 0 | F1 | |
| 1 | | F1 |
| 2 | | B1 |
| 3 | | B1 |
| 4 | B1 | |
| 5 | B1 | |
"""
    across = """
| device | 0 | 1 | 2 | 3 | 4 | 5 |
|---|---|---|---|---|---|---|
| a | F1 | | | | B1 | B1 |
| b | | F1 | B1 | B1 | | |
"""
    for text in (chart, across):
        table = read_table(text)
        assert isinstance(table, Timetable)
        assert validate_timetable(table) == []
        assert table.spans == (((0, 1), (4, 6)), ((1, 2), (2, 4)))
    as_order = read_table("F1 B1\nF1 B1")
    assert not isinstance(as_order, Timetable)
    assert table.schedule.devices == as_order.devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("| t | a |\n|---|---|\n| 0 | hello |", "'hello' is not an action"),
        ("| t | a |\n|---|---|\n| 1 | F0 |\n| 0 | BW0 |", "do not increase"),
        ("| t | a |\n|---|---|\n| 0 | F0 | F1 |", "columns"),
        ("0: F0@0-1 BW0", "has no times"),
        ("0: F0@1-0 BW0@1-2", "ends before it starts"),
    ],
)
def test_unreadable_timetables_say_why(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        read_table(text)
