"""CSV files of torch.distributed.pipelining, both ways. Those in tests/golden/pytorch_csv are
PyTorch 2.13's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cli.main import main
from common.schedule.action import parse_schedule
from common.schedule.generators import GENERATORS, default_chunks, make_schedule
from common.schedule.pytorch_csv import format_csv, read_schedule
from common.schedule.validate import Rule, validate
from common.spec.rules import why_impossible
from tests.parity.ladder import config

GOLDEN = Path(__file__).parents[1] / "golden" / "pytorch_csv"


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 8)])
def test_every_schedule_reads_back(name: str, p: int, m: int) -> None:
    schedule = make_schedule(name, p, m, default_chunks(name))
    again = read_schedule(format_csv(schedule), name)
    assert (again, again.location) == (schedule, schedule.location)


@pytest.mark.parametrize(
    ("file", "name"),
    [("interleaved-p2-m4", "interleaved"), ("zb-v-p2-m4-comms", "zb-v")],
)
def test_pytorchs_tables_are_ours(file: str, name: str) -> None:
    assert read_schedule((GOLDEN / f"{file}.csv").read_text(), name) == make_schedule(name, 2, 4, 2)


def test_pytorchs_1f1b_is_wrong_on_the_last_rank() -> None:
    found = validate(read_schedule((GOLDEN / "1f1b-p4-m8.csv").read_text()))
    assert [(v.rule, v.device, v.action) for v in found] == [
        (Rule.MISSING_ACTION, 3, "F0"),
        (Rule.BACKWARD_BEFORE_FORWARD, 3, "BW0"),
        (Rule.UNKNOWN_ACTION, 3, "F8"),
    ]


def test_overlapped_actions_and_any_placement() -> None:
    text = (GOLDEN / "dualpipev-p2-m4.csv").read_text()
    read = read_schedule(text)
    assert (read.placement, validate(read)) == ("vee", [])
    assert (
        str(read)
        .splitlines()[1]
        .endswith("F1.1 (F3&BW1.1) (F2.1&BW0) BW2.1 (F3.1&BW1) BW3.1 B2 W2 B3 W3")
    )
    assert read_schedule(format_csv(read)) == read_schedule(text.replace(";", " ; ")) == read
    uneven = parse_schedule("placement: 0 1 3 | 2\nF0 F0.1 F0.2 BW0.2 BW0.1 BW0\nF0 BW0")
    assert read_schedule(format_csv(uneven)) == uneven


def test_letters_idle_cells_and_the_older_b() -> None:
    read = read_schedule('"0F0",, 0F1,0I0,0W0,0B1\r\n\r\n1F0,1B0,1F1,1W0,1B1,,\r\n')
    assert read.devices == parse_schedule("F0 F1 B0 W0 BW1\nF0 B0 F1 W0 BW1").devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0", "line 1, column 2: '0X0' is not an action; expected stage, F, I, W or B"),
        ("0F0,0B0\n1F0,1B,", "line 2, column 2: '1B' is not"),
        ("F0,B0", "line 1, column 1: 'F0' is not"),
        ("0F0,0SEND_F,0B0", "line 1, column 2: '0SEND_F' is not"),
        ("0F0,0B0\n\n0F1,0B1", "line 3, column 1: stage 0 stands in line 1 too"),
        ("0F0,0B0\n,,", "line 2: no action"),
        (",\n", "line 1: no action"),
        ("0F0,(0F1;0X0)OVERLAP_F_B", "line 1, column 2: '0X0' is not"),
        ("0F0,(0B0;0F1)OVERLAP_F_B", "line 1, column 2: (0B0;0F1)OVERLAP_F_B; expected a forward"),
        ("0F0,(0F1;0I0)OVERLAP_F_B", "line 1, column 2: (0F1;0I0)OVERLAP_F_B; expected a forward"),
        ("0F0,0B0\n2F0,2B0", "stage 1 stands in no line; expected stages 0 to 2"),
        ("0F12345678901", "line 1, column 1: '0F12345678901' is not"),
        ("0" + "F0" * 70_000 + ",", "line 1: field larger than field limit"),
    ],
)
def test_a_broken_file_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(text)
    assert main(["validate", str(path)]) == main(["draw", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count(message) == 2 and error.count("\n") == 2


def test_subcommands_read_and_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, again, golden = tmp_path / "x.csv", tmp_path / "y.csv", GOLDEN / "zb-v-p2-m4-comms.csv"
    assert main(["simulate", str(golden), "--output", str(path)]) == 0
    assert "bubble fraction                   0.04\n" in capsys.readouterr().out
    assert main(["draw", f"file:{path}", "--output", str(again)]) == 0
    assert again.read_text() == path.read_text()
    assert main(["draw", "--schedule", f"file:{path}"]) == 0
    drawn = capsys.readouterr().out
    assert main(["draw", "zb-v", "--stages", "2", "--micro-batches", "4"]) == 0
    assert capsys.readouterr().out == drawn
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == "valid: 2 devices, 4 micro-batches, 48 actions\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("zb-h11", "schedule 'zb-h11' is unknown; expected one of"),
        ("nowhere/x.csv", "nowhere/x.csv: No such file"),
        ("1f1b --schedule gpipe", "expected one schedule"),
    ],
)
def test_a_word_is_a_name_or_a_file(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draw", *word.split(), "--stages", "2", "--micro-batches", "2"]) == 2
    assert message in capsys.readouterr().err


def test_pytorchs_runtime_needs_the_last_stages_forwards_in_order(tmp_path: Path) -> None:
    reasons = []
    for name, order in (("in", "01"), ("out", "10")):
        path = tmp_path / f"{name}.csv"
        path.write_text("0F{0},0F{1},0B{0},0B{1}\n1F{0},1F{1},1B{0},1B{1}\n".format(*order))
        one = config(
            "torch", 2, 2, "float32", "tied", "pre", "gelu", "even", 0.0,
            f"file:{path}", executor="native",
        )  # fmt: skip
        reasons.append(str(why_impossible(one) or ""))
    assert reasons[0] == "" and "forwards are not in micro-batch order; expected" in reasons[1]
