"""What a chart's gaps wait for, and its critical path."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from common.cli.main import main
from common.schedule.action import parse_schedule
from common.schedule.generators import GENERATORS, default_chunks, make_schedule
from common.schedule.picture import FRAME
from common.schedule.simulate import Costs, simulate
from common.schedule.why import critical_path, explain_gaps, gaps

CHART = """\
time     0  1  2  3  4  5  6  7  8
device 0 F0*F1 ·  ·  BW0── ·  BW1──*
device 1 ·  F0*BW0──*F1*BW1──*·  ·
critical path (*), 9 long: F0 on device 0, F0 ... BW1 on device 1, BW1 on device 0
device 0 is idle from 2 to 4: BW0 waits for BW0 of device 1, which ends at 4
device 0 is idle from 6 to 7: BW1 waits for BW1 of device 1, which ends at 7
device 1 is idle from 0 to 1: F0 waits for F0 of device 0, which ends at 1
device 1 is idle from 7 to 9: nothing is left to do; the last is BW1 of device 0
"""


def test_the_chart_of_1f1b(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "1f1b", "--stages", "2", "--micro-batches", "2", "--why"]) == 0
    assert capsys.readouterr().out == CHART


def test_a_message_on_its_way_and_a_pair_that_overlaps() -> None:
    schedule = parse_schedule("F0 F1 BW0 BW1\nF0 (F1&BW0) BW1")
    said = explain_gaps(simulate(schedule, Costs.uniform(2, communication=0.5)))
    assert said.splitlines()[:2] == [
        "critical path (*), 10 long: F0 on device 0, F0 (F1&BW0) on device 1, BW0 BW1 on device 0",
        "device 0 is idle from 2 to 6: BW0 waits for (F1&BW0) of device 1, which ends at 5.5; its "
        "message takes 0.5",
    ]


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0, 0.0), (1.0, 1.3, 0.6, 0.15)])
def test_gaps_fill_what_actions_leave_and_the_path_has_no_slack(
    name: str, costs: tuple[float, ...]
) -> None:
    schedule = make_schedule(name, 4, 9, default_chunks(name))
    given = Costs.uniform(4, *costs)
    simulation = simulate(schedule, given)
    for device, busy in enumerate(simulation.busy):
        idle = sum(gap.end - gap.start for gap in gaps(simulation) if gap.device == device)
        assert idle + busy == pytest.approx(simulation.makespan)
    path = critical_path(simulation)
    assert (simulation.start[path[0]], simulation.end[path[-1]]) == (0, simulation.makespan)
    # Along the path there are only actions and messages.
    table, spent = simulation.table, simulation.end - simulation.start
    hops = sum(table.device[a] != table.device[b] for a, b in itertools.pairwise(path))
    assert spent[path].sum() + hops * costs[3] == pytest.approx(simulation.makespan)


def test_pictures_frame_the_path_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["draw", "1f1b", "--stages", "2", "--micro-batches", "2", "--output"]
    svg, text = tmp_path / "x.svg", tmp_path / "x.txt"
    assert main([*line, str(svg), "--why"]) == main([*line, str(text), "--why"]) == 0
    actions, legend = 6, 1
    assert svg.read_text().count(FRAME["edgecolor"]) == actions + legend
    assert text.read_text() == "".join(CHART.splitlines(keepends=True)[:3])
    for suffix in (".csv", ".json"):
        assert main([*line, str(tmp_path / f"x{suffix}"), "--why"]) == 2
        assert "marks no path; expected .png, .svg or .txt" in capsys.readouterr().err
