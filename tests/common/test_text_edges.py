"""Text at the edges: names that are no UTF-8, streams that lack letters, markup, byte-order marks,
odd digits and homes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import main
from common.harness.bench import run_name
from common.io.console import make_console
from common.io.edges import from_command_line, number, printable, whole_number
from common.io.figure import log_y, new_figure
from common.runtime.job import Job, JobFile
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from tests.program import assert_refused, words

ROOT = Path(__file__).resolve().parents[2]
NASTY = os.fsdecode(b"caf\xe9 [red]$x^$ :smile: {0} %s |")
SCHEDULE = b"\xef\xbb\xbf0: F0 BW0\r\n1: F0 BW0\r\n"
TINY = TransformerSpec(context_length=4, num_layers=1, d_model=4, num_heads=2, d_ff=4)


def program(
    *argv: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    dropped = ("LC_", "LANG", "PYTHONUTF8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, *argv],
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        cwd=cwd or ROOT,
        capture_output=True,
        check=False,
    )


# -------------------------------------------------------------------------------------------- names


def test_a_job_holds_names_that_are_no_utf8(tmp_path: Path) -> None:
    config = RunConfig(
        model=TINY, schedule=f"file:{NASTY}", corpus=(NASTY,), train=TrainSpec(no_decay=(NASTY,))
    )
    jobs = JobFile(jobs=(Job(config=config, out=NASTY, resume=NASTY),))
    jobs.write(tmp_path / NASTY)
    assert JobFile.read(tmp_path / NASTY) == jobs
    (tmp_path / NASTY).read_bytes().decode("ascii")
    assert "\N{REPLACEMENT CHARACTER}" in config.schedule_name
    long = RunConfig(model=TINY, schedule=f"file:{'é' * 120}.txt")
    assert len(os.fsencode(run_name(long))) < 200


@pytest.mark.parametrize("text", ["half \ud800", "a\0b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"; expected text (of whole characters|without a NUL character)"
    ):
        RunConfig(corpus=(text,))


def test_a_whole_benchmark_under_nasty_names(tmp_path: Path) -> None:
    place = tmp_path / NASTY
    place.mkdir()
    (place / NASTY).write_bytes(SCHEDULE)
    (place / "text").write_text("The text of a corpus. " * 100)
    line = "-m tests.fakes.bench --preset tiny --steps 3 --repeats 1 --frameworks torch,paddle"
    line += " --micro-batches 1 --corpus text --out 'out [b]' --schedules"
    done = program(*words(line), f"file:{NASTY}", cwd=place)
    assert done.returncode == 0 and not done.stderr, done.stdout[-2000:] + done.stderr
    assert b"results in out [b]/" in done.stdout and b"report: out [b]/" in done.stdout
    (folder,) = (place / "out [b]").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "report.md", "summary.json", "table.csv", "loss.png"} <= names
    assert "| torch | " in (folder / "report.md").read_text(encoding="utf-8")
    both = (str(folder), str(folder))
    for subcommand in (["report", str(folder), "--out", "again"], ["compare", *both]):
        done = program("-m", "common.cli", *subcommand, cwd=place)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert b"caf" in done.stdout and b"[red]$x^$ :smile: {0} %s" in done.stdout


def test_a_prompt_is_utf8_in_every_locale() -> None:
    assert from_command_line("plain é", "--prompt") == "plain é"
    in_c = "é".encode().decode("ascii", "surrogateescape")  # as LC_ALL=C has it
    assert from_command_line(in_c, "--prompt") == "é"
    with pytest.raises(ValueError, match=r"--prompt: not UTF-8 \(byte 1\)"):
        from_command_line("a\udce9", "--prompt")


def test_names_in_messages_are_short_and_in_one_line() -> None:
    assert printable("a\nb\x1b[31m\udce9") == "a�b�[31m�"
    assert printable("x" * 100) == "x" * 77 + "..."


# ------------------------------------------------------------------------------------------ streams

CHART = words("-m common.cli draw --schedule 1f1b --stages 2 --micro-batches 2")


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "gbk"},  # it has · and ─, two columns wide
    ],
)
def test_a_stream_that_lacks_letters_shows_others(variables: dict[str, str]) -> None:
    done = program(*CHART, **variables)
    assert done.returncode == 0 and not done.stderr
    assert b"device 1 .  F0 BW0-- F1 BW1-- .  ." in done.stdout


@pytest.mark.parametrize("columns", ["0", "10", "²", "-5", "x"])
def test_a_terminal_of_no_width_is_not_believed(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width >= 20
    assert main.main(words("simulate --schedule all --stages 2 --micro-batches 2")) == 0


def test_a_picture_needs_no_home(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"), "/dev/null/nowhere")
    done = program(*CHART, "--output", str(tmp_path / "a.png"), **nowhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -------------------------------------------------------------------------------- files and numbers


def test_a_byte_order_mark_and_returns_are_no_part_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bom.txt").write_bytes(SCHEDULE)
    (tmp_path / "bom.toml").write_bytes(b'\xef\xbb\xbfpreset = "tiny"\r\nsteps = 3\r\n')
    assert main.main(["validate", str(tmp_path / "bom.txt")]) == 0
    assert main.main(["bench", "--config", str(tmp_path / "bom.toml"), "--dry-run"]) == 2
    assert "steps: unknown at the top level; expected under [train]" in capsys.readouterr().err
    command = [sys.executable, "-m", "common.cli", "validate", "-"]
    done = subprocess.run(command, input=SCHEDULE, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["²", "１２", "١٢", "0x10", "1e3", "nan", "inf", "", "5,", "1__0"])
def test_what_is_no_whole_number(text: str) -> None:
    assert whole_number(text) is None


def test_numbers_are_read_alike_everywhere() -> None:
    assert [whole_number(text) for text in ("5", "+5", " 5", "1_000", "5.0")] == [5, 5, 5, 1000, 5]
    found = [number(text) for text in ("nan", "inf", "1e3", "²", "x")]
    assert found == [None, None, 1000.0, None, None]


@pytest.mark.parametrize(
    "line",
    [
        "bench --preset tiny --steps ²",
        "bench --preset tiny --sweep --micro-batches ²,1",
        "train --steps １２",
        "train --save-every ²",
        "train --timeout nan",
        "train --hang-timeout 0",
        "draw --schedule 1f1b --stages ² --micro-batches 2",
        "simulate --schedule 1f1b --stages 2 --micro-batches 2 --forward nan",
        "simulate --schedule 1f1b --stages 2 --micro-batches 2 --kept-for-weight nan",
        "simulate --schedule all --stages 1000000000000000000000 --micro-batches 2",
        "drift --seeds ²",
        "drift --steps ²",
        "dump --out x.safetensors --step ²",
        "generate --checkpoint x --prompt-tokens ²",
        "generate --checkpoint x --temperature ²",
        "compare a b --fail-on ²%",
        f"import {'x' * 300} --from gpt2 --out y",
        f"train --out {'x' * 300}",
        f"train --config {'x' * 300}",
        f"evaluate --checkpoint {'x' * 300}",
        "bisect help=1 help=1",
        "dump --out /proc/a.safetensors",
        "bisect --json /proc/a.json framework=oracle framework=oracle",
        "drift --out /proc/a",
        "train --out /proc/a",
        "train --save-dir /proc/a",
    ],
)
def test_wrong_input_is_one_line_whatever_its_letters(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assert_refused(main.main(line.split()), "", capsys).startswith("triptych: ")


def test_numbers_on_a_logarithmic_axis_are_text() -> None:
    figure = new_figure(3, 3)
    axes = figure.add_subplot()
    log_y(axes)
    axes.set_ylim(1e-8, 1e-5)
    figure.canvas.draw()
    assert "1e\N{MINUS SIGN}06" in [label.get_text() for label in axes.get_yticklabels()]
    assert not any("$" in label.get_text() for label in axes.get_yticklabels(which="both"))
