"""Charts: the text says what the simulator says, colours cover it, traces are well-formed."""

from __future__ import annotations

import doctest
import importlib
import json

import pytest

from common.schedule.action import ScheduleError, parse_action
from common.schedule.draw import draw_color, draw_text
from common.schedule.generators import make_schedule
from common.schedule.simulate import Costs, simulate
from common.schedule.trace import chrome_traces

CHART = """\
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13
device 0 F0 F1 F2 ·  ·  B0 W0 F3 B1 W1 B2 W2 B3 W3
device 1 ·  F0 F1 ·  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
device 2 ·  ·  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"""


def test_the_chart_of_zb_h1() -> None:
    assert draw_text(make_schedule("zb-h1", 3, 4)) == CHART


@pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        ("naive", 2, 2, 1),
        ("gpipe", 2, 4, 1),
        ("1f1b", 2, 4, 1),
        ("zb-h1", 3, 4, 1),
        ("zb-h2", 3, 6, 1),
    ],
)
def test_docstrings_show_what_is_drawn(name: str, p: int, m: int, v: int) -> None:
    for line in draw_text(make_schedule(name, p, m, v)).splitlines()[1:]:
        # Docstrings leave out the idle ends of lines.
        assert line.rstrip("· ") in docstring(name), line


@pytest.mark.parametrize(
    "name", ["interleaved", "interleaved-overlap", "interleaved-zb", "zb-v", "dualpipev"]
)
def test_docstrings_with_chunks_show_the_beginning_of_what_is_drawn(name: str) -> None:
    schedule = make_schedule(name, 2, 4, 2)
    shown = [
        line.strip().removesuffix("...").rstrip()
        for line in docstring(name).splitlines()
        if line.strip().startswith("device")
    ]
    drawn = draw_text(schedule).splitlines()[1:]
    assert len(shown) == 2
    for line, whole in zip(shown, drawn, strict=True):
        assert len(line) > 60
        assert whole.startswith(line)


def docstring(name: str) -> str:
    """That of the function that makes the schedule."""
    function = "one_f_one_b" if name == "1f1b" else name.replace("-", "_")
    for module in ("generators", "zero_bubble", "controllable", "dualpipe"):
        found = getattr(importlib.import_module(f"common.schedule.{module}"), function, None)
        if found is not None:
            return str(found.__doc__)
    raise AssertionError(name)


def test_doctests() -> None:
    for name in ("action", "draw", "validate"):
        result = doctest.testmod(importlib.import_module(f"common.schedule.{name}"))
        assert result.attempted > 0
        assert result.failed == 0


def test_cells_stand_where_the_simulator_says() -> None:
    schedule = make_schedule("interleaved", 3, 5, 2)
    simulation = simulate(schedule)
    lines = draw_text(schedule).splitlines()
    # Half a unit: the shortest action, a chunk's forward.
    width = lines[0].index("0.5") - lines[0].index("0")
    head = lines[0].index("0")
    for row in range(simulation.table.num_rows):
        line = lines[1 + simulation.table.device[row]]
        at = head + round(float(simulation.start[row]) / 0.5 * width)
        assert parse_action(line[at:].split(" ")[0].rstrip("─")) == simulation.table.action(row)


def test_folded_charts_keep_every_action() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    folded = draw_text(schedule, width=60)
    assert max(map(len, folded.splitlines())) <= 60
    assert folded.count("F") == 32
    assert draw_text(schedule).count("BW") == 32


def test_colour_covers_every_action() -> None:
    schedule = make_schedule("zb-v", 2, 4, 2)
    text = draw_color(schedule)
    assert (
        text.plain.rstrip("\n").splitlines()[1].rstrip()
        == draw_text(schedule).splitlines()[1].rstrip()
    )
    assert len(text.spans) == schedule.num_actions


def test_a_chart_too_wide_is_refused() -> None:
    with pytest.raises(ScheduleError, match="too many for text"):
        draw_text(make_schedule("1f1b", 8, 4000))


def test_odd_costs_still_fit_the_labels() -> None:
    chart = draw_text(make_schedule("1f1b", 3, 12), Costs.uniform(3, 18.5, 18.1, 9.3, 0.6))
    for i in range(12):
        assert (
            chart.count(f"BW{i}─")
            + chart.count(f"BW{i} ")
            + chart.count(f"BW{i}\n")
            + chart.endswith(f"BW{i}")
            >= 3
        )


def test_trace_is_as_perfetto_reads_it() -> None:
    """Opened in Perfetto itself once; what it refused then is held here: overlaps, ids that are no
    numbers, a thread 0.
    """
    schedule = make_schedule("zb-h1", 3, 4)
    simulation = simulate(schedule, Costs.uniform(3, 1 / 7, 1 / 3, 1 / 11))
    events = json.loads(
        json.dumps(chrome_traces({"measured": simulation, "simulated": simulation}))
    )["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    lanes = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert len({tid for _, tid in lanes}) == 6 and all(pid and tid for pid, tid in lanes)
    for lane, name in lanes.items():
        mine = [event for event in complete if (event["pid"], event["tid"]) == lane]
        assert [event["name"] for event in mine] == [
            str(a) for a in schedule.devices[int(name.split()[1])]
        ]
        ends = [event["ts"] + event["dur"] for event in mine]
        assert all(end < event["ts"] for end, event in zip(ends, mine[1:], strict=False))
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(
        simulation.makespan * 1000, abs=0.01
    )
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert (
        starts.keys() == ends.keys()
        and len(starts) == 2 * (2 * 2 * 4)
        and all(isinstance(i, int) for i in starts)
    )
    assert all(
        starts[i]["ts"] <= ends[i]["ts"] and starts[i]["tid"] != ends[i]["tid"] for i in starts
    )
