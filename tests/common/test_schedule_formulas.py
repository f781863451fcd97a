"""The textbook's formulas, where they hold and where they do not."""

from __future__ import annotations

import json

import pytest

from common.cli.main import main
from common.schedule.formulas import textbook
from common.schedule.generators import make_schedule
from common.schedule.simulate import simulate


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 5), (4, 4), (4, 16), (8, 3)])
def test_all_hold_for_equal_stages(name: str, p: int, m: int) -> None:
    assert {each.verdict for each in textbook(simulate(make_schedule(name, p, m)))} == {"holds"}


def test_zero_bubble_has_less_and_naive_more_idle_time_than_the_textbook() -> None:
    idle = {name: textbook(simulate(make_schedule(name, 4, 8)))[-1] for name in ("zb-h1", "naive")}
    assert idle["zb-h1"].simulated < idle["zb-h1"].value == 36 < idle["naive"].simulated


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--schedule", "1f1b", "--stages", "4", "--micro-batches", "8"]
    assert main([*words, "--formulas"]) == 0
    assert capsys.readouterr().out.count("holds") == 4
    assert main([*words, "--formulas", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formulas"][2]["value"] == pytest.approx(8 / 11)
    assert main(["simulate", "--schedule", "1f1b,gpipe", "--formulas"]) == 2
    assert "--formulas: takes one schedule, not 2" in capsys.readouterr().err
