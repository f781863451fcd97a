"""Every generator: valid for all sizes, the published orders, text form and golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schedule import dependencies as rules
from common.schedule.action import Op, Schedule, ScheduleError, format_schedule, parse_schedule
from common.schedule.dependencies import Step, dependencies, sends_to
from common.schedule.generators import GENERATORS, SEARCH, default_chunks, make_schedule
from common.schedule.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"
FIXED = [name for name in GENERATORS if name != SEARCH]


def fewest(name: str, p: int) -> int:
    """The fewest micro-batches that the schedule takes."""
    return 2 * p if name == "dualpipev" else 1


def chunk_counts(name: str) -> list[int]:
    fixed = GENERATORS[name].chunks
    return [1, 2, 3, 4] if fixed is None else [fixed]


@pytest.mark.parametrize("name", FIXED)
def test_all_sizes_are_valid_and_in_micro_batch_order(name: str) -> None:
    for p in range(1, 9):
        for m in range(fewest(name, p), fewest(name, p) + 8):
            for v in chunk_counts(name):
                schedule = make_schedule(name, p, m, v)
                assert validate(schedule) == [], (p, m, v)
                whole = sum(a.op is Op.BW for row in schedule.devices for a in row)
                assert schedule.num_actions == 3 * p * m * v - whole
                assert whole in (0, p * m * v) or name == "dualpipev"
                for row in schedule.devices:
                    for op in Op:
                        for chunk in range(v):
                            order = [a.micro_batch for a in row if a.op is op and a.chunk == chunk]
                            assert order == sorted(order)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 8), (4, 2), (4, 8), (8, 8)])
def test_search_is_a_named_schedule_too(p: int, m: int) -> None:
    schedule = make_schedule(SEARCH, p, m)
    assert (schedule.name, schedule.num_devices, schedule.num_micro_batches) == (SEARCH, p, m)
    assert validate(schedule) == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FIXED), st.integers(1, 12), st.integers(1, 40), st.integers(1, 5))
def test_larger_sizes_are_valid_and_read_back(name: str, p: int, m: int, v: int) -> None:
    schedule = make_schedule(name, p, max(m, fewest(name, p)), GENERATORS[name].chunks or v)
    assert validate(schedule) == []
    assert parse_schedule(format_schedule(schedule)) == schedule


# The named schedules' own examples, as their papers draw them.
EXAMPLES = [
    ("naive", 2, 2, 1),
    ("gpipe", 4, 4, 1),
    ("1f1b", 4, 8, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 4, 6, 2),
    ("zb-h1", 4, 8, 1),
    ("zb-h2", 4, 8, 1),
    ("zb-v", 4, 8, 2),
    ("interleaved-overlap", 4, 8, 2),
    ("interleaved-zb", 4, 8, 2),
    ("v-half", 4, 8, 2),
    ("v-min", 4, 8, 2),
    ("dualpipev", 4, 8, 2),
]


@pytest.mark.parametrize(("name", "p", "m", "v"), EXAMPLES)
def test_golden_schedules_do_not_change(name: str, p: int, m: int, v: int) -> None:
    text = (GOLDEN / f"{name}-p{p}-m{m}-v{v}.txt").read_text()
    assert format_schedule(make_schedule(name, p, m, v)) == text
    assert parse_schedule(text) == make_schedule(name, p, m, v)


def test_interleaved_is_megatrons_where_that_exists() -> None:
    # Narayanan et al. 2021, figure 4: p = 4, m = 8, v = 2, first device.
    first = make_schedule("interleaved", 4, 8, 2).devices[0]
    warmup = "F0 F1 F2 F3 F0.1 F1.1 F2.1 F3.1 F4 F5"
    assert " ".join(map(str, first[:14])) == f"{warmup} F6 BW0.1 F7 BW1.1"


def test_make_schedule_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, message in [
        (("nope", 2, 2), "unknown"),
        (("1f1b", 2, 2, 2), "has 1 chunk per device, not 2"),
        (("zb-v", 2, 2, 1), "has 2 chunks per device, not 1"),
        (("1f1b", 0, 2), "at least 1"),
        (("file:/nowhere", 2, 2), "readable"),
    ]:
        with pytest.raises(ScheduleError, match=message):
            make_schedule(*arguments)
    path = tmp_path / "mine.txt"
    path.write_text("0: F0 BW0\n1: F0 BW0\n")
    assert make_schedule(f"file:{path}", 2, 1).name == "mine"
    with pytest.raises(ScheduleError, match="has stages = 2, the run has 3; expected --stages 2"):
        make_schedule(f"file:{path}", 3, 1)
    path.write_text("0: F0 huh\n")
    with pytest.raises(ScheduleError, match="line 1"):
        make_schedule(f"file:{path}", 1, 1)


def test_default_chunks() -> None:
    assert [default_chunks(name) for name in ("1f1b", "interleaved", "zb-v", "file:x")] == [
        1,
        2,
        2,
        1,
    ]


def test_the_header_is_optional_and_b_alone_means_bw() -> None:
    schedule = parse_schedule("F1 B1 F2 B2")
    assert schedule.devices == parse_schedule("F0 BW0 F1 BW1").devices
    assert schedule.first_micro_batch == 1


@pytest.mark.parametrize(
    "text", ["", "# nothing", "F0 X1", "1: F0", "# schedule: x chunks=two\nF0"]
)
def test_text_that_is_no_schedule(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse_schedule(text)


def test_dependencies_by_hand() -> None:
    assert dependencies(Step(Op.F, 3, 0), 4) == ()
    assert dependencies(Step(Op.F, 3, 2), 4) == (Step(Op.F, 3, 1),)
    assert dependencies(Step(Op.B, 3, 3), 4) == (Step(Op.F, 3, 3),)
    assert dependencies(Step(Op.BW, 3, 1), 4) == (Step(Op.F, 3, 1), Step(Op.B, 3, 2))
    assert dependencies(Step(Op.W, 3, 1), 4) == (Step(Op.B, 3, 1),)
    assert [sends_to(Step(op, 0, 1), 4) for op in (Op.F, Op.B, Op.BW, Op.W)] == [2, 0, 0, None]
    assert [sends_to(Step(op, 0, k), 4) for op, k in ((Op.F, 3), (Op.B, 0))] == [None, None]


def test_every_message_is_sent_where_it_is_needed() -> None:
    """A step that needs another virtual stage's result is the one to which that stage sends it."""
    for op in Op:
        for k in range(4):
            for needed in dependencies(Step(op, 0, k), 4):
                if needed.virtual_stage != k:
                    assert sends_to(needed, 4) == k
    assert set(rules.NEEDS) == set(rules.GIVES) == set(rules.MESSAGE_OFFSET) == set(Op)


def test_vee_turns_on_the_last_device() -> None:
    schedule: Schedule = make_schedule("zb-v", 4, 8, 2)
    assert [device for device, _ in schedule.location] == [0, 1, 2, 3, 3, 2, 1, 0]
