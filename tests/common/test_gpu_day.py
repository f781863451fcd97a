"""`make gpu-day` on a machine without a GPU: its lines, whatever happens to a check."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from common.cli.main import main
from common.spec import rules
from common.spec.gpus import Gpu
from tests.campaigns import gpu_day
from tests.campaigns.gpu_day import Check, Day, Failed, checks, timed


def python(code: str) -> tuple[tuple[str, ...], ...]:
    return ((sys.executable, "-c", code),)


def wrong(folder: Path, output: str) -> str:
    raise Failed("7 | 8")


def test_every_check_is_one_line_whatever_happens(tmp_path: Path) -> None:
    day = Day(tmp_path)
    for check in (
        Check("good", python("print('fine')"), gpu_day.agree),
        Check("other status", python("raise SystemExit('ValueError: no')")),
        Check("wrong status wanted", python("raise SystemExit(1)"), statuses=(1,)),
        Check("wrong result", python(""), wrong),
        Check("no result", python(""), gpu_day.speeds),
        Check("endless", python("import time; time.sleep(100_000)"), seconds=0),
        Check("elsewhere", not_run="needs several GPUs"),
    ):
        day.run(check)
    day.budget_seconds = time.monotonic() - day.began + 0.5
    for name in ("cut short", "too late"):
        day.run(Check(name, python("import time; time.sleep(100_000)")))
    lines = [line.split(" | ") for line in (tmp_path / "verdicts.md").read_text().splitlines()]
    assert [(verdict.strip("| "), name, seen.rstrip(" |")) for verdict, name, _, seen in lines] == [
        ("pass", "good", "fine"),
        ("FAIL", "other status", "exit status 1 of command 1: ValueError: no"),
        ("pass", "wrong status wanted", ""),
        ("FAIL", "wrong result", "7 / 8"),
        ("FAIL", "no result", "no summary.json"),
        ("FAIL", "endless", "not done after 0 s, in command 1"),
        ("not run", "elsewhere", "needs several GPUs"),
        ("not run", "cut short", "not done after 0 s, in command 1"),
        ("not run", "too late", "no time left"),
    ]


def test_without_a_gpu_it_says_so_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "visible_gpus", lambda: ())
    assert gpu_day.main([str(tmp_path / "day")]) == 2
    assert capsys.readouterr().err.startswith("no GPU: ")
    assert not (tmp_path / "day").exists()


@pytest.mark.parametrize(
    ("framework", "gpus"),
    [("torch", 1), ("torch", 8), ("tensorflow", 8), ("paddle", 1), ("paddle", 8)],
)
def test_every_benchmark_is_one_that_can_be(
    framework: str, gpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rules, "visible_gpus", lambda: (Gpu("card", 80 * 2**30, "580.0"),) * gpus)
    monkeypatch.setattr(rules, "has_cuda", lambda: True)
    every = [*checks(framework, gpus), *timed({framework: gpus})]
    assert len({check.name for check in every}) == len(every), "names are folders too"
    for check in every:
        for command in check.commands if not check.not_run else ():
            if command[1].endswith("bench_all.py"):
                assert main(["bench", *command[2:], "--dry-run"]) == 0, (
                    check.name,
                    capsys.readouterr().err,
                )
                assert "impossible" not in capsys.readouterr().out
