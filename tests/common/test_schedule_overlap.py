"""Two actions that overlap are one in the text, the validator, the simulator and the charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.schedule.action import Schedule, ScheduleError, format_schedule, parse_schedule
from common.schedule.draw import draw_text
from common.schedule.picture import draw_picture
from common.schedule.simulate import Costs, simulate
from common.schedule.trace import chrome_trace
from common.schedule.validate import validate

TEXT = """# schedule: pairs micro_batches=3
0: F0 F1 (F2&BW0) BW1 BW2
1: F0 (F1&BW0) (F2&BW1) BW2
"""
PLAIN = str.maketrans("&", " ", "()")


@pytest.fixture
def pairs() -> Schedule:
    return parse_schedule(TEXT)


def test_the_text_reads_back(pairs: Schedule) -> None:
    assert format_schedule(pairs) == TEXT
    assert parse_schedule(TEXT) == pairs != parse_schedule(TEXT.translate(PLAIN))
    assert validate(pairs) == []


def test_a_pair_starts_when_both_can_and_ends_at_once() -> None:
    """By hand, all costs 1: F1 could start at 1, but BW0's gradient arrives at 6."""
    costs = Costs((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    simulation = simulate(parse_schedule("0: F0 (F1&BW0) BW1\n1: F0 BW0 F1 BW1\n"), costs)
    # The first of the two is over in no time; the second takes the time of both.
    assert simulation.start.tolist() == [0, 6, 6, 14, 2, 3, 10, 11]
    assert simulation.end.tolist() == [1, 6, 9, 16, 3, 5, 11, 13]
    assert simulation.busy.tolist() == [6, 6]
    assert simulation.peak_in_flight_per_stage == [2, 1]


def test_the_pair_may_have_a_time_of_its_own(pairs: Schedule) -> None:
    # F0 on both devices, the three pairs one after the other, then two backwards.
    assert simulate(pairs).makespan == 2 + 3 * 3 + 2 * 2
    quick = Costs((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0), overlap=(2.0, 2.0))
    assert simulate(pairs, quick).makespan == 2 + 3 * 2 + 2 * 2
    with pytest.raises(ScheduleError, match="negative"):
        Costs((1.0,), (1.0,), (1.0,), (0.0,), overlap=(-1.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(BW0&F1)", "expected a forward and a whole backward"),
        ("(F0&F1)", "expected a forward and a whole backward"),
        ("F0 (F1&B0) W0 BW1", "expected a whole backward"),
        ("(F0&BW0", "is not an action"),
        ("(F0&BW0&BW1)", "is not an action"),
        ("(F0)", "is not an action"),
        ("()", "is not an action"),
    ],
)
def test_what_cannot_overlap_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(f"0: {text}\n")


def test_a_pair_needs_what_both_need() -> None:
    (found,) = validate(parse_schedule("0: (F0&BW0)\n"))
    assert str(found) == (
        "[backward-before-forward] device 0, action 0 (BW0): needs F0, with which it overlaps"
    )
    # One after the other these end; at the same time each waits for the other's result.
    rows = "0: F0 {} BW1\n1: {} F1 BW1\n"
    assert validate(parse_schedule(rows.format("F1 BW0", "F0 BW0"))) == []
    circle = "0: F0 F1 (F2&BW0) BW1 BW2\n1: F0 F1 F2 BW0 BW1 BW2\n"
    assert [each.rule for each in validate(parse_schedule(circle))] == ["deadlock"]
    assert validate(parse_schedule(circle.translate(PLAIN))) == []


def test_messages_count_the_words_of_the_text() -> None:
    (found,) = validate(parse_schedule("F0 F1 (F2&BW0) F3 BW1 BW2 BW4\n"))[-1:]
    assert "device 0, action 6 (BW4)" in str(found)


def test_charts_show_one_box(pairs: Schedule, tmp_path: Path) -> None:
    assert draw_text(pairs).splitlines()[1].endswith("F0 F1 ·  ·  ·  (F2&BW0) ·  ·  ·  BW1── BW2──")
    events = [each for each in chrome_trace(simulate(pairs))["traceEvents"] if each["ph"] == "X"]
    assert sum(each["name"] == "(F2&BW0)" for each in events) == 1
    assert len(events) == 5 + 4
    draw_picture(simulate(pairs), tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 5000
