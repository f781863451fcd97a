"""The subcommands as a user calls them: output, exit status, one line for wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from common.cli.main import main
from common.schedule.action import parse_schedule
from common.schedule.generators import GENERATORS
from common.schedule.validate import validate
from tests.program import assert_refused, words

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = words("--stages 4 --micro-batches 8")
ROW: dict[str, Any] = json.loads((GOLDEN / "zero_bubble_tables.json").read_text())["rows"][0]
V_SHAPED = ["zb-v", "v-half", "v-min"]
TIMES = [f"--{key.replace('_', '-')}={value}" for key, value in ROW["milliseconds"].items()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("draw 1f1b --memory-limit 3", "--memory-limit: only schedule search has it, not 1f1b"),
        ("simulate 1f1b,zb-h1 --objective warm", "--objective: only schedule search has it, not"),
        ("draw zb-v --seed 1", "--seed: only schedule search has it"),
        ("simulate 1f1b --kept-for-recompute 0.3", "expected with --recompute"),
        ("draw 1f1b --activation-bytes 3", "unknown option"),
        ("simulate gpipe,zb-v --chunks 2", "cannot choose"),
        ("draw PATH --chunks 2", "--chunks 2; the schedule in the file has 1"),
        ("draw PATH --overlap 2", "nothing overlaps in mine"),
        ("draw PATH --group-size 2", "only schedule interleaved has it"),
        ("draw 1f1b --warm-up short", "--warm-up: only schedule interleaved has it, not 1f1b"),
        ("simulate gpipe,1f1b --overlap 2", "gpipe, 1f1b"),
        ("simulate zb-v --forward 1,2,3", "expected 1, 2 or 4"),
        ("simulate 1f1b --tensor-parallel 3", "does not divide num_heads = 8"),
        (f"simulate 1f1b --tensor-parallel {10**20}", "does not divide num_heads = 8"),
        ("simulate 1f1b --tensor-parallel 2 --hosts 5", "processes of 1 x 2 stages x 2 shards"),
        ("simulate 1f1b --hosts 3", "--hosts 3: does not divide the 2 processes of 1 x 2 stages"),
        ("simulate 1f1b --replicas 2 --hosts 3", "4 processes of 2 x 2 stages; expected a divisor"),
        ("simulate 1f1b --forward 1e308", "'1e308' is not a number or a comma list of numbers, 0"),
        ("simulate 1f1b --replicas 5000", "too many to list; expected at most 707"),
        ("simulate 1f1b,gpipe --hosts 2", "of one schedule; expected one name"),
    ],
)
def test_options_that_nothing_reads_are_refused(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("0: F0 BW0\n1: F0 BW0\n")
    size = "" if "PATH" in line else " --stages 2 --micro-batches 2"
    status = main((line + size).replace("PATH", str(tmp_path / "mine.txt")).split())
    assert_refused(status, message, capsys)


def test_draw_prints_the_chart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "--schedule", "1f1b", *SIZE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("device 3 ·  ·  ·  F0 BW0── F1 BW1──")
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("txt", b"time"), ("json", b"{")]
)
def test_draw_writes_files(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"chart.{suffix}"
    assert main(["draw", "interleaved", *SIZE, "--output", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(begins) and len(content) > 500
    if suffix == "json":
        events = json.loads(content)["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 4 * 8 * 2 * 2


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["simulate", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_simulate_gives_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--stages", str(ROW["stages"]), "--micro-batches", str(ROW["micro_batches"])]
    for name, chunks in (
        ("1f1b", 1),
        ("interleaved", ROW["layers"] // ROW["stages"]),
        ("zb-h1", 1),
        ("zb-h2", 1),
    ):
        result = simulated(capsys, "--schedule", name, *size, "--chunks", str(chunks), *TIMES)
        key = "warm_start_bubble_fraction" if name == "zb-h2" else "bubble_fraction"
        assert result[key] == pytest.approx(ROW["bubble_fraction"][name], abs=0.5e-4)
        assert (result["schedule"], result["stages"], result["micro_batches"]) == (name, 8, 24)
        assert (result["chunks"], len(result["bubble_fraction_per_stage"])) == (chunks, 8)
        if name == "interleaved":
            assert result["bubble_fraction_every_wrap_around"] > result["bubble_fraction"]
        else:
            assert "wrap_around" not in result


def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", ""]) == 2
    assert capsys.readouterr().err == "triptych: FILE: empty; expected FILE\n"


def test_standard_input_that_does_not_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/zero").open(encoding="utf-8") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert main(["validate", "-"]) == 2
    assert "more than 67108864 bytes" in capsys.readouterr().err


def test_simulate_says_what_travels_between_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    line = "1f1b --stages 2 --micro-batches 2 --replicas 2 --hosts 2 --preset tiny"
    links = simulated(capsys, *words(line))["bytes_per_step"]
    # The replicas of a stage share a host. What crosses: for each replica two micro-batches of two
    # sequences, S 16, D 32, float32.
    assert list(links) == ["host 0", "host 0 to host 1", "host 1 to host 0", "host 1"]
    assert links["host 0 to host 1"] == links["host 1 to host 0"] == 2 * 2 * 2 * 16 * 32 * 4


def test_simulate_takes_one_number_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    line = "gpipe --stages 2 --micro-batches 3 --forward 1,2 --backward-input 1,2"
    result = simulated(capsys, *words(f"{line} --backward-weight 0 --activation-bytes 100"))
    assert result["makespan"] == 2 * (1 + 2 + 2 * 2)
    assert result["bubble_fraction_per_stage"] == pytest.approx([1 - 6 / 14, 1 - 12 / 14])
    assert result["peak_in_flight_per_stage"] == [3, 3]
    assert result["peak_bytes_per_stage"] == [300, 300]


def test_simulate_writes_a_searched_schedule_that_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "found.txt"
    costs = words("--backward-input 0.9 --backward-weight 0.5 --communication 0.02")
    line = words("search --memory-limit 1.5 --stages 3 --micro-batches 6")
    found = simulated(capsys, *line, *costs, "--output", str(path))
    assert validate(parse_schedule(path.read_text())) == []
    assert max(found["peak_memory_per_stage"]) <= 4.5
    assert found["bubble_fraction"] >= found["bubble_fraction_bound"] - 1e-12
    again = simulated(capsys, "--schedule", f"file:{path}", *costs)
    assert again["makespan"] == found["makespan"]
    assert main(["validate", str(path)]) == 0


def test_search_takes_an_objective_and_at_most_so_many_chunks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["search", *SIZE, *TIMES, "--memory-limit", "1", "--effort", "0.02"]
    plain = simulated(capsys, *options)
    warm = simulated(capsys, *options, "--objective", "warm", "--seed", "3")
    one = simulated(capsys, *options, "--chunks", "1")
    assert plain["makespan"] <= min(warm["makespan"], one["makespan"])
    assert warm["warm_start_bubble_fraction"] <= plain["warm_start_bubble_fraction"]
    assert (plain["chunks"], one["chunks"]) == (2, 1)
    assert one["bubble_fraction_bound"] > plain["bubble_fraction_bound"] >= 0
    assert "bubble_fraction_bound" not in warm and warm["warm_start_bubble_fraction_bound"] >= 0


def test_validate_lists_violations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["validate", str(GOLDEN / "schedules" / "zb-v-p4-m8-v2.txt")]) == 0
    assert capsys.readouterr().out == "valid: 4 devices, 8 micro-batches, 192 actions\n"
    path = tmp_path / "reversed.txt"
    path.write_text("F0 BW0 F1 BW1\nF0 BW1 BW0\n")
    assert main(["validate", str(path)]) == 1
    out = capsys.readouterr().out
    assert "[missing-action] device 1: F1 is missing" in out
    assert out.splitlines()[-1].startswith("not valid: 3 violations (2 devices")
    path.write_text("F0 F1 BW1 BW0\nF0 F1 BW1 BW0\n")
    assert main(["validate", str(path)]) == 0
    assert "out of micro-batch order" in capsys.readouterr().out


def test_compare_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SIZE, "--schedule", "all", "--chunks", "3", "--json"]) == 0
    results = {result["schedule"]: result for result in json.loads(capsys.readouterr().out)}
    assert list(results) == list(GENERATORS)
    assert results["interleaved"]["chunks"] == results["interleaved-zb"]["chunks"] == 3
    assert results["zb-h1"]["bubble_fraction"] < results["1f1b"]["bubble_fraction"]
    assert main(["simulate", *SIZE, "--schedule", "gpipe,zb-v"]) == 0
    out = capsys.readouterr().out
    assert "gpipe" in out
    assert "0.0588" in out
    assert "1f1b" not in out


def test_all_leaves_out_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--stages", "4", "--micro-batches", "7", "--json"]
    assert main(["simulate", *size, "--schedule", "all", "--forward", "1,1,1,1,1,1,1,2"]) == 0
    out, err = capsys.readouterr()
    names = [result["schedule"] for result in json.loads(out)]
    assert names == ["interleaved", "interleaved-overlap", "interleaved-zb", *V_SHAPED]
    assert err.startswith("left out: naive (--forward: 8 numbers for 4 stages; expected 1 or 4); ")
    assert "dualpipev (schedule dualpipev: 7 micro-batches on 4 stages; expected at least 8" in err
    assert err.splitlines()[1].startswith("note: v-min has no slack")
    assert main(["simulate", *size, "--schedule", "all", "--forward", "1,2,3"]) == 2
    assert main(["simulate", *size, "--schedule", "1f1b,dualpipev"]) == 2


def test_the_warm_up_of_interleaved_is_chosen_by_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.txt"
    line = ["simulate", "--schedule", "interleaved", *SIZE, "--output", str(path)]
    peak = {}
    for name, options in {
        "full": [],
        "short": ["--warm-up", "short"],
        "free": ["--warm-up", "auto"],
        "slow": ["--warm-up", "auto", "--communication", "0.05"],
    }.items():
        assert main([*line, *options, "--json"]) == 0
        peak[name] = json.loads(capsys.readouterr().out)["peak_in_flight_per_stage"][0]
    assert peak == {"full": 5.5, "short": 4, "free": 4, "slow": 5.5}
    assert main([*line, "--group-size", "5"]) == 0
    assert " F4 F0.1 " in path.read_text()


def test_recomputation_is_timed_for_schedules_in_files_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.txt"
    assert main(["simulate", "--schedule", "1f1b", *SIZE, "--output", str(path)]) == 0
    capsys.readouterr()
    options = ["--recompute", "full", "--kept-for-recompute", "0.25", "--json"]
    assert main(["simulate", "--schedule", f"file:{path}", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["recompute"], result["makespan"], result["peak_memory_per_stage"][0]
    assert found == ("full", 44, 1)
    assert main(["simulate", *SIZE, "--schedule", "all", *options]) == 0
    assert "search" not in [each["schedule"] for each in json.loads(capsys.readouterr().out)]


@pytest.mark.parametrize(
    "line",
    [
        "draw 1f1b --stages 4",
        "draw nope SIZE",
        "draw 1f1b SIZE --output x.gif",
        "draw 1f1b SIZE --output /nowhere/x.txt",
        "draw 1f1b --stages 0 --micro-batches 1",
        "draw 1f1b --stages 8 --micro-batches 5000",
        "draw SIZE",
        "simulate 1f1b SIZE --forward 1,2",
        "simulate 1f1b SIZE --forward x",
        "simulate 1f1b SIZE --forward -1",
        "simulate zb-v SIZE --chunks 3",
        "simulate search SIZE --memory-limit 0.1",
        "simulate search SIZE --effort 0",
        "simulate search SIZE --objective cold",
        "simulate 1f1b SIZE --recompute every",
        "simulate 1f1b SIZE --recompute full --kept-for-recompute 2",
        "simulate search SIZE --recompute full",
        "simulate --schedule file:/nowhere",
        "validate /nowhere",
        f"validate {GOLDEN / 'impossible_1f1b.md'}",
        "simulate SIZE --schedule 1f1b,nope",
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], line: str) -> None:
    status = main(line.replace("SIZE", " ".join(SIZE)).split())
    assert_refused(status, "", capsys, silent=True)
