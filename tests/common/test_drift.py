"""The drift zoo's harness, with the oracle in place of the frameworks; each framework's habits are
tested with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from common.cli import drift as subcommand
from common.cli.main import main
from common.harness.launch import Implementation
from common.harness.zoo import config_of
from common.report.zoo import Zoo
from common.spec.habits import DRIFTS
from common.spec.run import FRAMEWORKS
from tests.common.test_interpreters import environment
from tests.program import assert_refused, words

ROOT = Path(__file__).resolve().parents[2]
ROWS = "layer-norm-epsilon,default-betas,unscaled-micro-batches,onednn,tanh-gelu,keras-momentum"


def zoo_of_fakes(line: str, **values: Any) -> int:
    """Exit status of `triptych drift`, with the oracle for TensorFlow."""
    parser = argparse.ArgumentParser()
    subcommand.register(parser.add_subparsers())
    arguments = parser.parse_args(words(f"drift --frameworks tensorflow {line}", **values))
    arguments.command = "triptych drift"
    return subcommand.run(
        arguments, {"tensorflow": Implementation("tests.fakes.drifting", "numpy", "")}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit status and output folder of a small zoo."""
    out = tmp_path_factory.mktemp("zoo")
    line = "--rows {rows} --steps 20,30 --seeds 3 --out {out}"
    return zoo_of_fakes(line, rows=ROWS, out=out), out


def test_every_row_says_what_came_of_it(made: tuple[int, Path]) -> None:
    status, out = made
    zoo = Zoo.model_validate_json((out / "drift.json").read_text())
    rows = {row.name: row for row in zoo.rows}
    assert status == 1
    assert {name: row.verdict.partition(":")[0] for name, row in rows.items()} == {
        "layer-norm-epsilon": "as expected",
        "default-betas": "as expected",
        "unscaled-micro-batches": "elsewhere",
        "onednn": "not seen",
        "tanh-gelu": "failed",
        "keras-momentum": "not seen",
    }
    assert (rows["layer-norm-epsilon"].check, rows["layer-norm-epsilon"].place) == (
        "activation",
        "block.0",
    )
    assert (rows["unscaled-micro-batches"].check, rows["unscaled-micro-batches"].place) == (
        "gradient",
        "head.norm.bias",
    )
    assert rows["tanh-gelu"].verdict == "failed: ValueError: this framework has no tanh"
    assert rows["onednn"].cost == {20: 0, 30: 0} and rows["default-betas"].cost[30] != 0
    assert all(0 < spread < 1 for spread in rows["default-betas"].spread.values())
    assert len(rows["default-betas"].curve) == len(zoo.spread_curve) == 3


def test_the_page_and_the_picture_are_made_from_it(made: tuple[int, Path], tmp_path: Path) -> None:
    _, out = made
    page = (out / "drift.md").read_text()
    assert "| `default-betas`: beta2 = 0.999 |" in page and "| loss curve, " in page
    assert "gradient: head.norm.bias" in page and "(expected: loss)" in page
    assert (out / "images" / "drift.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    assert main(["drift", "--from", str(out / "drift.json"), "--out", str(again)]) == 1
    assert (again / "drift.md").read_text() == page


def test_rows_are_run_again_or_added_and_the_others_are_taken_from_an_earlier_result(
    made: tuple[int, Path], tmp_path: Path
) -> None:
    whole = Zoo.model_validate_json((made[1] / "drift.json").read_text())
    without = [row for row in whole.rows if row.name != "default-betas"]
    whole.model_copy(update={"rows": without}).write(tmp_path / "earlier.json")
    line = "--from {earlier} --rows default-betas,onednn --json {json}"
    json_file = tmp_path / "merged.json"
    assert zoo_of_fakes(line, earlier=tmp_path / "earlier.json", json=json_file) == 1
    assert Zoo.model_validate_json(json_file.read_text()) == whole


def test_two_versions_of_a_framework_have_a_row_each(
    made: tuple[int, Path], tmp_path: Path
) -> None:
    new, json_file = environment(tmp_path / "new"), tmp_path / "merged.json"
    line = "--from {earlier} --rows default-betas --frameworks tensorflow@{new} --json {json}"
    assert zoo_of_fakes(line, earlier=made[1] / "drift.json", new=new, json=json_file) == 1
    zoo = Zoo.model_validate_json(json_file.read_text())
    rows = [(row.framework, row.verdict) for row in zoo.rows if row.name == "default-betas"]
    assert rows == [("tensorflow", "as expected"), ("tensorflow@new", "as expected")]
    assert {*zoo.versions} == {"tensorflow", "tensorflow@new"}


def test_the_list_names_every_habit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(drift.name in out for drift in DRIFTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rows nope", "--rows = 'nope': unknown"),
        ("--frameworks jax", "--frameworks = 'jax': unknown"),
        ("--frameworks torch@none", "--frameworks torch@none: no such file; expected a Python"),
        ("--steps 10,x", "expected whole numbers"),
        ("--seeds 0", "expected a whole number, at least 1"),
        ("--from /nowhere", "No such file"),
        ("--json /no/such/place.json", "expected a path in a folder that exists"),
        (f"--out {__file__}/docs", "is a file; expected a folder"),
        (f"--from {ROOT}/docs/drift.json --steps 9", "--steps: --from runs nothing"),
        (f"--from {ROOT}/docs/drift.json --rows tf32 --seeds 9", "--seeds: --from takes this"),
        (f"--from {__file__}", "expected a file that --json has written"),
    ],
)
def test_wrong_input_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(["drift", *line.split()]), message, capsys)


def test_every_habit_has_a_run_that_can_show_it() -> None:
    for drift in DRIFTS:
        for framework in FRAMEWORKS:
            on, off = (config_of(drift, framework, 30, switched) for switched in (True, False))
            assert (on.drift, off.drift) == (drift.name, None)
            assert json.loads(on.model_dump_json()) | {"drift": None} == json.loads(
                off.model_dump_json()
            )
