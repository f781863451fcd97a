"""The report from result files: one page that opens anywhere, the subcommands that make and compare
reports.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.cli import main
from common.oracle.limits import LIMITS
from common.report.collect import collect
from common.report.compare import oracle_config
from common.report.machine import this_machine
from common.report.plots import line_styles
from common.report.publish import publish
from common.report.result import IS_ORACLE, Parity, RunResult, measured
from common.report.statistics import TOO_FEW
from common.runtime.job import Part, StepRecord
from common.runtime.outcome import Outcome
from common.schedule.generators import make_schedule
from common.schedule.simulate import Costs, simulate
from common.spec.run import Framework, RunConfig, preset
from tests.common.test_stats import played
from tests.program import assert_refused, words

STEPS = 7
SKIPPED = "needs a browser: none of chromium, chromium-browser, google-chrome is installed"


def config(framework: Framework, **fields: Any) -> RunConfig:
    return RunConfig(**dict(preset("tiny")) | {"framework": framework} | fields)


def outcome(run: RunConfig, scale: float = 1.0, losses: float = 5.0) -> Outcome:
    """A run that went as simulated, `scale` ms per unit, but for a slower first step."""
    schedule = make_schedule(run.schedule, run.stages, run.train.micro_batches, run.chunks)
    costs = Costs.uniform(run.stages, communication=0.1)
    simulation = simulate(schedule, costs)
    records = []
    for step in range(STEPS):
        unit = scale * 1e-3 * (5 if step == 0 else 1 + 0.01 * (step % 3))
        events = played(schedule, costs, unit, begin=step)
        seconds, loss = unit * (simulation.makespan + 1), losses - 0.1 * step
        records.append(
            StepRecord(step=step, loss=loss, gradient_norm=1.0, seconds=seconds, events=events)
        )
    part = Part(
        devices=tuple(range(run.stages)),
        steps=records,
        held_out_loss=4.0,
        build_seconds=0.1,
        peak_memory_bytes={0: 10**8},
        held_activation_peak_bytes=dict.fromkeys(range(run.stages), 5 * 10**6),
        in_flight_peak=dict(enumerate(simulation.peak_chunks_in_flight_per_stage)),
        environment={"version": "1.0", "threads": 1},
        corpus_digest="0123456789abcdef0123",
        corpus_bytes=10,
    )
    return Outcome("ok", "", None, (part,), 1.0)


def write(
    folder: Path,
    run: RunConfig,
    done: Outcome,
    row: int,
    repeat: int = 0,
    parity: Parity | None = None,
) -> None:
    result = RunResult(
        **measured(done, run, 1),
        preset="tiny",
        row=row,
        repeat=repeat,
        config=run,
        parity=parity
        or Parity(status="pass", tensors=42, margins={"loss": 0.01, "gradient": 0.25}),
        command="bench_all.py --preset tiny",
        machine=this_machine(),
        started="2030-01-01T00:00:00+00:00",
    )
    home = folder / ("oracle" if result.is_oracle else f"{run.framework}-{row}-r{repeat}")
    home.mkdir(parents=True)
    result.write(home / "result.json")


def benchmark(folder: Path, torch_scale: float = 1.0) -> Path:
    """Torch and Paddle twice, TensorFlow wrong, an interleaved row, one that failed, and the
    oracle.
    """
    torch = config("torch")
    oracle = oracle_config(torch)
    write(folder, oracle, outcome(oracle), 0, parity=Parity(reason=IS_ORACLE))
    near = LIMITS["loss_curve"]["float32"] * 0.3
    for repeat in range(2):
        write(folder, torch, outcome(torch, torch_scale), 0, repeat)
        write(folder, config("paddle"), outcome(config("paddle"), 2.0, 5 * (1 + near)), 2, repeat)
    wrong = Parity(status="FAIL", reason="gradient <script>alert(1)</script> differs", tensors=42)
    write(folder, config("tensorflow"), outcome(config("tensorflow"), 1.5, 5.01), 1, parity=wrong)
    chunked = config("torch", schedule="interleaved", chunks=2)
    write(folder, chunked, outcome(chunked, 1.1), 3)
    failed = Outcome("failed", "crashed with SIGSEGV", None, (), 1.0)
    write(folder, config("paddle", schedule="zb-h1"), failed, 4, parity=Parity())
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = benchmark(tmp_path_factory.mktemp("run"))
    publish(collect([folder]), folder)
    return folder


class Page(HTMLParser):
    """What the page asks for from elsewhere, and whether its elements close."""

    VOID = ("meta", "link", "br", "hr", "input", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag == "li" and self.open[-1] != "li":  # may close by itself
            return
        assert self.open.pop() == tag, tag


def test_the_page_is_one_well_formed_file_without_a_network(published: Path) -> None:
    text = (published / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    for address in page.addresses:
        assert address == "data:," or address[0] == "#" or (published / address).is_file(), address
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    names = ("verdict", "throughput-matched", "parity", "timing", "timelines")
    order = [text.index(f'id="{name}"') for name in names]
    assert order == sorted(order)
    assert "Parity: 5 of 6 runs train what the float64 oracle trains" in text
    assert "crashed with SIGSEGV" in text and "bench_all.py --preset tiny" in text


def test_every_format_is_there_and_says_the_same(published: Path) -> None:
    markdown = (published / "report.md").read_text()
    assert "1 differs; 1 failed" in markdown and "not ranked" in markdown
    assert "| torch 1f1b p=2 m=4 |" in markdown
    rows = json.loads((published / "summary.json").read_text())["rows"]
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["baseline", "not ranked", "slower", TOO_FEW, "not ranked"]
    assert rows[2]["ratio"] == pytest.approx(0.5)
    assert rows[2]["ratio_low"] <= 0.5 <= rows[2]["ratio_high"] < 1
    for name in ("loss.png", "throughput.png", "time_split.png", "torch-0-r0/timeline.png"):
        assert (published / name).read_bytes().startswith(b"\x89PNG"), name
    assert json.loads((published / "torch-0-r0/trace.json").read_text())["traceEvents"]
    timing = RunResult.read(published / "torch-0-r0" / "result.json").timing
    assert timing is not None and abs(timing.step_difference) < 0.02


def test_every_line_of_a_picture_looks_unlike_the_others() -> None:
    styles = line_styles(["torch"] * 40 + ["paddle"])
    assert len({str(style) for style in styles}) == 41


def test_a_reason_has_a_column_only_where_there_is_one(tmp_path: Path, published: Path) -> None:
    assert "| reason |" in (published / "report.md").read_text()
    write(tmp_path, config("torch"), outcome(config("torch")), 0)
    publish(collect([tmp_path]), tmp_path)
    assert "| row | parity | tensors | loss | gradient |\n" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(SKIPPED)
    return found


LOOK = """
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const box = page.querySelector("#timelines .row .time"), zoom = page.getElementById("zoom");
  const seen = {overflow: root.scrollWidth - root.clientWidth};
  seen.background = view.getComputedStyle(page.body).backgroundColor;
  seen.whole = box.scrollWidth - box.clientWidth;
  zoom.value = 50; zoom.dispatchEvent(new view.Event("input"));
  seen.zoomed = box.firstElementChild.offsetWidth / box.clientWidth;
  const which = page.getElementById("which");
  which.value = 2; which.dispatchEvent(new view.Event("change"));
  seen.shown = [...page.querySelectorAll("#timelines .row")].map(row => !row.hidden);
  const action = page.querySelector(".time path title").parentElement;
  action.dispatchEvent(new view.Event("pointerover", {bubbles: true}));
  seen.said = page.getElementById("say").textContent;
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "END";
});
</script>
"""


def look(browser: str, page: Path, tmp_path: Path, width: int, dark: bool) -> dict[str, Any]:
    """What a browser makes of the page in a window of this width."""
    frame = (
        f'<iframe style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(page.read_text())}"></iframe>'
    )
    (tmp_path / "look.html").write_text(f"<!doctype html><body>{frame}{LOOK}</body>")
    flags = words(
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --window-size=1500,1000 "
        "--user-data-dir={profile} --blink-settings=preferredColorScheme={scheme} --dump-dom",
        profile=tmp_path / "profile",
        scheme=0 if dark else 1,
    )
    command = [browser, *flags, (tmp_path / "look.html").as_uri()]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search("SEEN(.*)END", output)
    assert found is not None, output[-2000:]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.parametrize(("width", "dark"), [(1366, False), (390, True)])
def test_the_page_works_in_a_browser(
    browser: str, published: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    seen = look(browser, published / "report.html", tmp_path, width, dark)
    assert seen["overflow"] <= 0, "the page is wider than the window"
    red = int(re.findall(r"\d+", seen["background"])[0])
    assert red < 60 if dark else red > 200
    assert seen["whole"] <= 1 and seen["zoomed"] == pytest.approx(40**0.5, rel=0.01)
    assert seen["shown"] == [False, False, True, False]
    assert re.match(r"F0 on device 0: 0\.00 to \d", seen["said"])


# -------------------------------------------------------------------------------------- subcommands


def triptych(*argv: str) -> int:
    return main.main([str(word) for word in argv])


def test_report_rebuilds_and_merges(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = benchmark(tmp_path / "other", torch_scale=1.2)
    assert triptych("report", str(other)) == 0
    assert (other / "report.html").is_file()
    assert triptych("report", str(published), str(other), "--out", str(tmp_path / "both")) == 0
    text = (tmp_path / "both" / "report.md").read_text()
    for name in (other.name, published.name):
        assert f"torch 1f1b p=2 m=4 {name}" in text
    capsys.readouterr()


def test_compare_says_what_moved_and_gates_on_it(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = benchmark(tmp_path / "slower", torch_scale=1.2)
    assert triptych("compare", str(published), str(published), "--fail-on", "5%") == 0
    assert triptych("compare", str(published), str(slower)) == 0
    capsys.readouterr()
    assert triptych("compare", str(published), str(slower), "--fail-on", "5%") == 1
    output = capsys.readouterr().out
    assert re.search(r"torch 1f1b p=2 m=4 .* 0\.833 \[0\.\d+, 0\.\d+\] +slower", output)
    assert re.search(r"paddle 1f1b p=2 m=4 .* 1\.000 .* no difference shown", output)
    assert "fails: torch 1f1b p=2 m=4: slower by more than 5.000%" in output
    assert re.search(r"torch interleaved .* \d\.\d+ \[unknown\] +too few samples", output)
    assert triptych("compare", str(published), str(slower), "--fail-on", "0.3") == 0
    # Faster is no failure.
    assert triptych("compare", str(slower), str(published), "--fail-on", "5%") == 0


def test_a_gate_that_can_judge_no_row_is_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, config("torch"), outcome(config("torch")), 0)
    assert triptych("compare", str(tmp_path), str(tmp_path), "--fail-on", "5%") == 2
    few = "too few samples in every row; expected 6 timed steps in each of 2 repeats"
    assert few in capsys.readouterr().err


def test_compare_fails_on_a_row_that_broke(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(published, broken)
    path = broken / "torch-0-r0" / "result.json"
    content = json.loads(path.read_text())
    content["parity"] |= {"status": "FAIL", "reason": "gradient"}
    path.write_text(json.dumps(content))
    assert triptych("compare", str(published), str(broken), "--fail-on", "50%") == 1
    assert "torch 1f1b p=2 m=4: no longer ok: parity FAIL" in capsys.readouterr().out


WRONG = {
    "report {tmp}/none": "holds no */result.json",
    "report {tmp}/future": "schema_version = 99; this program reads 1 to 4",
    "report {run} {tmp}/future": "add --out FOLDER",
    "report {run} {run} --out {tmp}/both": "the same run twice",
    "compare {run}": "RUN_B",
    "compare {run} {tmp}/other": "no row in common",
    "compare {run} {run} --fail-on much": "expected a share below 100 %, such as 5% or 0.05",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line_and_status_2(
    line: str, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other", config("torch", stages=1), outcome(config("torch", stages=1)), 0)
    shutil.copytree(tmp_path / "other", tmp_path / "future")
    path = next((tmp_path / "future").glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    status = triptych(*words(line, tmp=tmp_path, run=published))
    assert_refused(status, WRONG[line], capsys)


def test_a_result_of_version_1_is_read(tmp_path: Path, published: Path) -> None:
    content = json.loads((published / "torch-0-r0" / "result.json").read_text())
    for name in ("untimed_steps", "timing", "row", "held_activation_peak_bytes", "in_flight_peak"):
        del content[name]
    content["last_step_events"] = content.pop("median_step_events")
    del content["config"]["track"]
    path = tmp_path / "old" / "torch" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content | {"schema_version": 1}))
    result = RunResult.read(path)
    assert (result.untimed_steps, result.timing) == (1, None) and result.median_step_events
    publish(collect([tmp_path / "old"]), tmp_path / "old")
    assert "Measured against simulated" not in (tmp_path / "old" / "report.md").read_text()
