"""The table of margins, with the oracle in place of the frameworks."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from common.harness.launch import Implementation
from tests.campaigns import margins_command as subcommand
from tests.campaigns.__main__ import main
from tests.campaigns.margins import Margin, config_of
from tests.campaigns.margins_page import explanation_in, verdict
from tests.program import assert_refused, words

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_and_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    subcommand.register(parser.add_subparsers())
    out = tmp_path / "margins.md"
    out.write_text("# Old\n<!-- by hand -->\nWhy float32 has less.\n<!-- end -->\n| old |\n")
    line = "margins --repeats 1 --frameworks torch,paddle --dtypes float64,bfloat16 --out {out}"
    arguments = parser.parse_args(words(line, out=out))
    arguments.command = "python -m tests.campaigns margins"
    fake = Implementation("tests.fakes.drifting", "numpy", "")
    assert subcommand.run(arguments, {"torch": fake, "paddle": fake}) == 0
    page = out.read_text()
    assert "| torch | float64 | gradient | 0.0000 | 0.0000 | 1 |" in page and "| old |" not in page
    # No error at all: the floor is the limit.
    assert "| paddle | bfloat16 | loss curve | 0.3333 | 0.3333 | 1 |" in page
    assert explanation_in(page) == "Why float32 has less."
    assert "Every check has at least 5 times room" in page


def test_a_check_without_room_is_named() -> None:
    fields = {"framework": "torch", "dtype": "float32", "median": 0.1, "repeats": 2}
    fields |= {"worst_run": "r", "worst_tensor": "t"}
    two = [Margin(check="loss", worst=0.1, **fields), Margin(check="gradient", worst=0.3, **fields)]
    text = verdict(two)
    assert text.startswith("1 of 2 checks have less than 5 times room: torch float32 gradient; ")
    assert "0.300" in text
    relative = two[1].model_copy(update={"dtype": "bfloat16"})
    good = verdict([two[0], relative])
    assert good.startswith("Every check has at least 5 times room")
    assert (
        "The rule of bfloat16 holds in every repeat: at most 0.30 of what it allows is used (torch "
        "bfloat16" in good
    )
    worse = relative.model_copy(update={"worst": 1.01})
    assert not worse.has_room and "does not hold in every repeat" in verdict([two[0], worse])


def test_the_seeds_walk_through_the_models() -> None:
    models = [config_of("torch", "float32", seed).model for seed in range(20)]
    assert len({(m.tied_head, m.norm, m.activation) for m in models}) == 8
    assert {m.dropout > 0 for m in models} == {True, False}


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in {
        "--repeats 0": "expected a whole number, at least 1",
        "--dtypes float16": "--dtypes = 'float16': unknown",
        "--frameworks ,": "--frameworks: nothing named",
        "--out /no/such/place.md": "--out /no/such/place.md: expected a path in a folder that",
        "--out /": "--out /: is a folder; expected a file",
    }.items():
        assert_refused(main(["margins", *line.split()]), message, capsys)
