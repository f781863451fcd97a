"""What a user types and sees: options, precedence, wrong input, exit status, interruption."""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from common.cli import main
from common.cli.config import add_options, read_bench
from common.cli.options import add_run_options, read_run
from common.cli.parser import Parser
from common.harness.bench import describe, run_name
from common.harness.launch import Implementation
from common.harness.options import Bench
from common.io.usage import UsageError
from common.report.result import RunResult
from common.runtime import oracle_worker
from common.schedule.action import format_schedule
from common.schedule.generators import GENERATORS, make_schedule
from common.spec import rules
from common.spec.run import FRAMEWORKS, RunConfig
from tests.program import assert_refused, with_defaults, words
from tests.waiting import marked, wait_until

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"--preset": "tiny", "--steps": 3, "--schedules": "1f1b", "--repeats": 1}


def bench(*argv: str) -> Bench:
    parser = Parser(prog="bench_all.py")
    add_options(parser)
    return read_bench(parser.parse_args(argv))


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bench.toml"
    path.write_text(text)
    return str(path)


# -------------------------------------------------------------------------------------- right input


def test_the_default_compares_all_frameworks_over_two_stages() -> None:
    points = bench().points
    assert [(c.framework, c.schedule) for c in points] == [
        (framework, schedule)
        for schedule in ("gpipe", "1f1b")
        for framework in ("torch", "tensorflow", "paddle")
    ]
    assert {c.stages for c in points} == {2}


def test_lists_make_a_grid() -> None:
    points = bench(
        "--preset", "tiny", "--stages", "1,2,4", "--micro-batches", "4,8", "--dtype", "float64"
    ).points
    assert len(points) == len(set(points)) == 3 * 2 * 3 * 2
    assert {(c.stages, c.train.micro_batches) for c in points} == {
        (p, m) for p in (1, 2, 4) for m in (4, 8)
    }


def test_a_schedule_brings_its_own_number_of_chunks() -> None:
    points = bench(
        "--preset", "tiny", "--framework", "torch", "--schedules", "1f1b,interleaved,zb-v"
    ).points
    assert {c.schedule: c.chunks for c in points} == {"1f1b": 1, "interleaved": 2, "zb-v": 2}


def test_all_schedules_but_those_that_do_not_fit() -> None:
    line = ("--preset", "tiny", "--frameworks", "torch,paddle", "--schedules", "all")
    everything = bench(*line, "--stages", "2", "--micro-batches", "4")
    assert {point.schedule for point in everything.points} == set(GENERATORS)
    assert everything.left_out == ""
    fewer = bench(*line, "--stages", "2", "--micro-batches", "3,4")
    assert len(fewer.points) == 2 * (2 * len(GENERATORS) - 1)
    assert fewer.left_out.startswith("dualpipev (--schedules: schedule dualpipev: 3 micro-batches")
    assert fewer.left_out.count("(") == 1
    # What no schedule can be is an error as ever.
    with pytest.raises(UsageError, match="stages x chunks = 9"):
        bench(*line, "--stages", "2,9", "--micro-batches", "4")


@pytest.mark.parametrize(
    ("line", "count", "why"),
    [
        ("--replicas 1,2 --compress none,fp16", 18, "--compress = fp16: one replica sends no"),
        ("--tensor-parallel 1,2 --vocab-parallel", 6, "--vocab-parallel: cuts among shards"),
        ("--frameworks torch,paddle --dtype float32,bfloat16", 6, "--dtype = bfloat16: paddle"),
        ("--schedules 1f1b,dualpipev --micro-batches 3,4", 9, "--schedules: schedule dualpipev: 3"),
    ],
)
def test_a_combination_that_cannot_be_is_left_out_and_a_value_refused(
    line: str, count: int, why: str
) -> None:
    found = bench("--preset", "tiny", *line.split())
    assert len(found.points) == count and found.left_out.startswith(why)
    with pytest.raises(UsageError, match="stages x chunks = 9"):
        bench("--preset", "tiny", "--stages", "2,9", *line.split())


def test_precedence_is_preset_then_file_then_command_line(tmp_path: Path) -> None:
    toml = (
        'preset = "tiny"\nstages = [1, 2]\nschedules = "gpipe"\nrepeats = 3\n[model]\nd_model = '
        "48\nnum_heads = 3\n"
    )
    toml += "[train]\nsteps = 7\nclip_norm = 'none'\n"
    found = bench("--config", config_file(tmp_path, toml), "--steps", "5")
    config = found.points[0]
    # From the preset, the file and the command line.
    assert (config.model.num_layers, config.model.d_model, config.train.steps) == (2, 48, 5)
    assert (config.train.clip_norm, found.options.repeats, {c.stages for c in found.points}) == (
        None,
        3,
        {1, 2},
    )


def one_run(tmp_path: Path, text: str, *argv: str) -> RunConfig:
    """What a command that does one run makes of a TOML file."""
    parser = Parser(prog="triptych")
    add_run_options(parser)
    return read_run(parser.parse_args(["--config", config_file(tmp_path, text), *argv]))


def test_one_run_takes_its_preset_from_the_file_too(tmp_path: Path) -> None:
    assert one_run(tmp_path, 'preset = "small"').model.num_layers == 6
    assert one_run(tmp_path, 'preset = "small"', "--preset", "tiny").model.num_layers == 2
    with pytest.raises(UsageError, match=r"bench\.toml: preset = 'smal': unknown; expected small"):
        one_run(tmp_path, 'preset = "smal"')


def test_cuda_graphs_are_used_where_they_can_be_unless_they_are_off(tmp_path: Path) -> None:
    assert [one_run(tmp_path, text).cuda_graphs for text in ("", 'cuda_graphs = "off"')] == [
        "auto",
        "off",
    ]
    assert one_run(tmp_path, 'cuda_graphs = "off"', "--cuda-graphs", "auto").cuda_graphs == "auto"
    with pytest.raises(
        UsageError, match=r"bench\.toml: cuda_graphs = 'of': unknown; expected .*off"
    ):
        one_run(tmp_path, 'cuda_graphs = "of"')


def test_a_setting_that_a_command_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bench\.toml: repeats: not a setting of this command"):
        one_run(tmp_path, "repeats = 3")


def test_every_field_of_the_specification_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for flag in (
        "--d-model",
        "--tied-head",
        "--learning-rate-schedule",
        "--no-decay",
        "--partition",
        "--corpus",
        "--cuda-graphs auto|off",
    ):
        assert flag in text
    point = bench(
        "--framework", "torch", "--tied-head", "--no-decay", "*.bias", "--partition", "1"
    ).points[0]
    assert (point.model.tied_head, point.train.no_decay, point.partition) == (
        True,
        ("*.bias",),
        (1,),
    )


def test_baselines_are_the_frameworks_own_pipelines_and_a_plain_loop_each() -> None:
    points = bench("--baselines", "--schedules", "1f1b,zb-h1").points
    ours = [(c.framework, c.schedule) for c in points if c.executor == "table"]
    assert len(ours) == 6
    native = [(c.framework, c.schedule, c.stages) for c in points if c.executor == "native"]
    assert native == [("torch", "1f1b", 2), ("paddle", "1f1b", 2), ("torch", "zb-h1", 2)]
    plain = [c for c in points if c.executor == "plain"]
    assert [c.framework for c in plain] == ["torch", "tensorflow", "paddle"]
    assert {(c.stages, c.train.micro_batches) for c in plain} == {(1, 1)}


def test_a_sweep_keeps_the_mini_batch() -> None:
    points = bench("--sweep", "--micro-batches", "1,3,12").points
    assert {c.train.batch_size for c in points} == {16}
    assert {c.train.micro_batches for c in points} == {1, 3, 12}


def test_a_framework_whose_own_pipeline_takes_equal_micro_batches_is_no_baseline_of_others() -> (
    None
):
    points = bench(
        "--baselines", "--framework", "torch", "--schedules", "1f1b", "--micro-batches", "4,5"
    ).points
    assert {c.train.micro_batches for c in points if c.executor == "native"} == {4}


def test_a_baseline_that_cannot_run_is_no_row() -> None:
    line = "--preset tiny --baselines --stages 4 --micro-batches 2 --framework torch"
    native = [c.schedule for c in bench(*words(line)).points if c.executor == "native"]
    assert native == ["gpipe"]  # its 1f1b needs m >= p
    frameworks = {c.framework for c in bench("--dtype", "bfloat16", "--baselines").points}
    assert frameworks == {"torch", "tensorflow"}


def test_paddle_has_bfloat16_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "has_cuda", lambda: True)
    on_gpus, on_cpu = (
        bench("--dtype", "bfloat16", "--device", device).points for device in ("cuda", "cpu")
    )
    assert {c.framework for c in on_gpus} == {*FRAMEWORKS}
    assert {c.framework for c in on_cpu} == {"torch", "tensorflow"}


def test_a_schedule_file_brings_its_chunks(tmp_path: Path) -> None:
    file = tmp_path / "two.txt"
    file.write_text(format_schedule(make_schedule("interleaved", 2, 2, 2)))
    line = "--preset tiny --framework torch --micro-batches 2 --schedules file:{file}"
    argv = words(line, file=file)
    assert [point.chunks for point in bench(*argv).points] == [2]
    with pytest.raises(UsageError, match="has chunks = 2, the run has 1; expected --chunks 2"):
        bench(*argv, "--chunks", "1")


def test_the_first_steps_are_not_timed() -> None:
    assert bench().options.untimed_steps == 2
    assert bench("--steps", "2").options.untimed_steps == 1


def test_the_warm_up_of_a_preset_follows_fewer_steps() -> None:
    assert bench("--steps", "2").points[0].train.warmup_steps == 2


def test_native_dropout_takes_the_nearest_probability(tmp_path: Path) -> None:
    def dropout(*argv: str) -> tuple[str, float]:
        model = bench("--framework", "torch", *argv).points[0].model
        return model.dropout_masks, round(model.dropout, 6)

    assert dropout("--dropout", "native") == ("native", 0.1)
    assert dropout("--dropout", "native:0.25") == ("native", 0.25)
    assert dropout("--preset", "tiny", "--dropout", "0.2") == ("shared", 0.2)
    file = config_file(tmp_path, "[model]\ndropout = 0.3\n")
    assert dropout("--config", file, "--dropout", "native") == ("native", 0.3)
    assert dropout("--config", config_file(tmp_path, "[model]\ndropout = 'native:0.4'\n")) == (
        "native",
        0.4,
    )


def test_recomputation_makes_a_grid_whose_rows_have_names_of_their_own() -> None:
    line = "--preset tiny --framework torch --recompute none,full,every-2 --baselines"
    points = bench(*words(line)).points
    ours = [point for point in points if point.executor == "table"]
    assert {point.recompute for point in ours} == {"none", "full", "every-2"}
    assert {point.recompute for point in points if point.executor != "table"} == {"none"}
    for name in (run_name, describe):
        assert len({name(point) for point in points}) == len(points)
    assert run_name(ours[-1]) == "torch-1f1b-p2-m4-recompute-every-2"


def test_a_drift_brings_what_it_needs_to_show() -> None:
    (tanh,) = bench("--drift", "tanh-gelu", "--schedules", "1f1b").points
    assert (tanh.framework, tanh.train.dtype, describe(tanh)) == (
        "tensorflow",
        "float32",
        "tensorflow 1f1b p=2 m=8 drift=tanh-gelu",
    )
    local = bench("--drift", "local-dropout-samples", "--framework", "torch").points[0]
    assert local.model.dropout > 0
    assert (
        bench("--drift", "local-dropout-samples", "--dropout", "0.3").points[0].model.dropout > 0.2
    )


# -------------------------------------------------------------------------------------- wrong input

WRONG = {
    "--preset tinny": "--preset = 'tinny': unknown; expected tiny",
    "--frameworks torch,jax": "--frameworks = 'jax': unknown; expected one of torch, "
    "tensorflow, paddle",
    "--frameworks tensorfow": "expected tensorflow",
    "--schedules gpip": "did you mean gpipe?",
    "--schedules file:/no/such": "/no/such",
    "--stages 9": "expected at most 8",
    "--stages 0": "--stages = '0': expected a whole number, at least 1",
    "--stages two": "--stages = 'two': expected a whole number, at least 1",
    "--stages 1.5": "--stages = '1.5': expected a whole number, at least 1",
    "--stages 2 4": "'4': belongs to no option; a list takes commas",
    "--micro-batches 17": "micro_batches = 17 is more than batch_size = 16",
    "--micro-batches 5 --executor native --frameworks torch": "micro_batches = 5 does not divide "
    "batch_size = 16",
    "--dtype float16": "expected bfloat16 (or float32, float64)",
    "--norm per": "--norm = 'per': unknown; expected pre (or post)",
    "--d-model 100": "num_heads = 8 does not divide d_model = 100",
    "--d-modle 64": "--d-modle: unknown option; expected --d-model",
    "--learning-rate fast": "--learning-rate = 'fast': expected a number, more than 0.0",
    "--learning-rate nan": "--learning-rate = 'nan': expected a number, more than 0.0",
    "--dropout 1": "expected a number, at least 0.0 and less than 1.0",
    "--dropout native:x": "--dropout = 'x': expected a number, at least 0.0 and less than 1.0",
    "--dropout native --dropout-masks shared": "--dropout = native and --dropout-masks = shared "
    "disagree",
    "--recompute every-0": "expected none, full, except-last, every-N with N at least 1",
    "--drift tanh": "--drift = 'tanh': unknown; expected tanh-gelu",
    "--drift nothing-like-it": "expected one of tanh-gelu, float32-gelu-constant",
    "--drift tanh-gelu --frameworks torch": "torch has no such habit; expected --frameworks "
    "tensorflow",
    "--drift swapped-swiglu --activation relu": "--drift = swapped-swiglu: changes nothing where "
    "activation = relu; expected for instance swiglu",
    "--drift native-dropout --dropout 0": "changes nothing where dropout = 0.0; expected",
    "--no-causal --sequence-lengths random": "would see what fills a sequence up; expected full",
    "--clip-norm 0": "expected a number, more than 0.0 or none",
    "--steps": "--steps: expected one argument",
    "--steps 3 --warmup-steps 4": "expected 0 to 3",
    "--schedules zb-v --chunks 3": "--schedules: schedule zb-v has 2 chunks per device, not 3",
    "--partition 9,2": "partition = (9, 2) needs 1 increasing boundaries between 1 and 7",
    "--partition odd": "expected even, balanced, or boundaries such as 2,5",
    "--vocab-size 100": "the tokenizer 'bytes' has 256 tokens",
    "--repeats 0": "--repeats = '0': expected a whole number, at least 1",
    "--timeout -1": "--timeout = '-1': expected a number, more than 0",
    "--sweep": "give a list",
    "--chunks 2": "the default --schedules: schedule gpipe has 1 chunk per device, not 2",
    "--sweep --micro-batches 1,2,32": "micro_batches = 32 is more than batch_size = 16",
    "--untimed-steps 12": "leaves none of 8 steps; expected 0 to 7",
    "--executor native": "paddle with 1f1b",
    "--executor native --frameworks torch --stages 4 --micro-batches 2 "
    "--schedules 1f1b": "takes at least as many as",
    "--executor native --frameworks torch --stages 3 --micro-batches 7 --batch-size 7 --schedules "
    "interleaved": "of 2",
    "--executor native --frameworks torch --schedules 1f1b "
    "--micro-batches 5": "expected equal micro-batches",
    "--executor native --frameworks torch --recompute full": "--recompute = full: executor = "
    "native recomputes nothing",
    "--executor plain --stages 1 --frameworks torch --dtype "
    "bfloat16": "executor = plain does not compute in it",
    "--executor native --frameworks torch --drift "
    "default-betas": "executor = native has no such habit",
    "--frameworks paddle --dtype bfloat16": "paddle cannot compute in it on a CPU; expected a GPU, "
    "torch or tensorflow",
    "--device cuda": "--device = cuda: this machine has no NVIDIA driver; expected cpu or auto",
    "--corpus /no/such/text": "/no/such/text: No such file or directory",
    "--config /no/such.toml": "expected a readable TOML file",
    "--out /dev/null": "--out /dev/null",
    "--stages 2 --stages 4": "--stages: given twice; expected once, with commas between values",
    "--framework torch --frameworks paddle": "--frameworks: given twice; expected once",
    "--parity --no-parity": "--parity/--no-parity: given twice; expected once",
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "has_cuda", lambda: False)


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line_and_status_2(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = assert_refused(main.bench_main(line.split()), WRONG[line], capsys, silent=True)
    assert error.startswith("bench_all.py: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nd_modle = 3\n", "[model] d_modle: unknown; expected d_model"),
        ("d_model = 3\n", "d_model: unknown at the top level; expected under [model]"),
        ("stagse = 2\n", "stagse: unknown at the top level; expected stages"),
        ("model = 3\n", "expected a table [model]"),
        ("[train]\nsteps = 'x'\n", "[train] steps = 'x': expected a whole number, at least 1"),
        ("stages = \n", "not TOML"),
        ("stages = true\n", "stages = true: expected a whole number, at least 1"),
        (
            "[train]\nlearning_rate = true\n",
            "learning_rate = true: expected a number, more than 0.0",
        ),
        ('corpus = "a\\u0000b"\n', "expected text without a NUL character"),
        ("corpus = [3]\n", "corpus = [3]: expected text, or a list of it"),
        ("'' = 3\n", ": unknown at the top level"),
        ("['']\nstages = 3\n", ": unknown at the top level"),
        ("parity = 'maybe'\n", "parity = 'maybe': expected true or false"),
        ("schedule = ''\n", "schedule = '': expected text that is not empty"),
        ("[model]\nsteps = 3\n", "[model] steps: unknown; expected under [train]"),
        ("[train]\nstages = 3\n", "[train] stages: unknown; expected at the top level"),
        (
            "schedule = 'gpipe'\nschedules = '1f1b'\n",
            "the same as {path}: schedule; expected one of them",
        ),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = config_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        bench("--config", path)
    assert str(error.value).startswith(path) and message.format(path=path) in str(error.value)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="the corpus has 9 tokens; expected at least"):
        bench("--corpus", str(tmp_path / "short.txt"))


def test_a_schedule_that_cannot_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("0: BW0 F0\n1: F0 BW0\n")
    with pytest.raises(UsageError, match=r"bad.txt: breaks"):
        line = "--preset tiny --micro-batches 1 --schedules file:{folder}/bad.txt"
        bench(*words(line, folder=tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tain --steps 3", "unknown subcommand 'tain'; did you mean train?"),
        ("bench --schedles gpipe", "--schedles: unknown option; expected --schedules"),
        ("simulate --schedule gpipe --stges=2", "--stges=2: unknown option; expected --stages"),
        ("train --save-dir= --steps 1", "--save-dir: empty; expected DIR"),
        ("train --resume=", "--resume: empty; expected latest|PATH"),
        ("simulate --schedule 1f1b --stages 2 --stages 3", "--stages: given twice; expected once"),
        ("bisect framework=torch,framework=paddle x", "--framework: given twice; expected once"),
        (
            "bench --preset tiny --frameworks torch --tensor-parallel 1,3 --vocab-parallel",
            "--tensor-parallel = 3: does not divide num_heads = 2",
        ),
        ("train --fault kill@device=2 --steps 1", "there is no device 2; expected 0 to 1"),
        ("train --fault kill@step=9 --steps 2", "there is no step 9; expected 0 to 1"),
        (
            "train --fault kill@action=B0 --stages 1 --micro-batches 2",
            "device 0 has no B0 in schedule 1f1b; expected one of F0, BW0, F1, BW1",
        ),
        (
            "train --fault disk-full@step=2 --save-every 2 --steps 6",
            "step 2 does not save; expected 5, the last, or one that --save-every names",
        ),
        ("report results/example --sweep", "--sweep: no two ranked rows differ"),
        (
            "report results/example --out /dev/null",
            "--out /dev/null: File exists; expected a folder",
        ),
        ("frobnicate", "unknown subcommand 'frobnicate'; expected one of bench, train, evaluate"),
        ("export x --to kears --out y", "--to: 'kears': unknown; expected keras"),
        ("simulate --schedule 1f1 --stages 2 --micro-batches 2", "did you mean 1f1b?"),
        ("drift --rows tanh-glu", "--rows = 'tanh-glu': unknown; expected tanh-gelu"),
        (
            "drift --rows onednn,tanh-gelu --frameworks torch,paddle",
            "not a habit of torch,paddle; expected --frameworks tensorflow",
        ),
        (
            "train --executor native --fault kill",
            "executor = native does not tell its actions; expected executor = table",
        ),
        (
            "train --threads 5000",
            "--threads = '5000': expected a whole number, at least 1 and at most 1024 or none",
        ),
        (
            "dump --executor native --out x",
            "executor = native: runs no unit by itself; expected executor = table",
        ),
        ("explain zb-h9", "zb-h9 has no explanation; expected one of naive, gpipe"),
        ("explain zb-v --chunks 3", "schedule zb-v has 2 chunks per device, not 3"),
        ("explain 1f1b --stages 0", "expected a whole number, at least 1"),
        ("explain 1f1b --memory-limit 2", "--memory-limit: only schedule search"),
        ("doctor --frameworks jax", "--frameworks = 'jax': unknown"),
        ("doctor --rounds -1", "'-1'; expected a whole number, at least 0"),
        ("doctor --rounds ²", "'²'; expected a whole number, at least 0"),
        ("doctor --d-model 33", "num_heads"),
        ("doctor --schedule 1f1b", "--schedule: unknown option"),
        ("doctor --json no/such/folder/x.json", "--json"),
        ("plan --devices 2 --memory-limit 3parsecs", "expected a size such as 32GB"),
        ("plan --devices 2 --memory-limit 0GB", "expected a size such as 32GB"),
        ("plan --devices 2 --memory-limit -5GB", "expected a size such as 32GB"),
        ("plan --devices 2 --schedules zb-9", "'zb-9': unknown"),
        ("plan --devices 2 --costs nowhere.json", "nowhere.json: No such file"),
        (f"plan --devices 2 --costs {__file__}", "not a profile"),
        ("plan --devices 2 --stages 2", "--stages: plan decides this"),
        ("plan --devices 0", "at least 1"),
        ("plan --devices 2 --output plan.xyz", "expected a picture, .png or .svg"),
    ],
)
def test_every_subcommand_names_what_is_wrong(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main.main(line.split()), message, capsys, silent=True)


HEAVY = ("jinja2", "matplotlib", "scipy", "tokenizers")


@pytest.mark.parametrize(
    "subcommand",
    ["", *{module: subcommand for subcommand, (module, _) in main.SUBCOMMANDS.items()}.values()],
)
def test_help_imports_nothing_that_it_does_not_need(subcommand: str) -> None:
    code = (
        "import sys; from common.cli.main import main\ntry: main(sys.argv[1:])\nfinally: "
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *subcommand.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    unwanted = {*HEAVY, *(("numpy", "pydantic", "rich", "psutil") if not subcommand else ())}
    assert "--help" in done.stdout and not unwanted & set(done.stderr.split())


# --------------------------------------------------------------------------------------------- runs


def start(
    tmp_path: Path, *argv: str, shell: str = 'exec "$@"', **variables: str
) -> subprocess.Popen[str]:
    """The benchmark with fakes, started by a line of shell."""
    options = with_defaults(QUICK | {"--out": tmp_path}, argv)
    command = [sys.executable, "-m", "tests.fakes.bench", *options]
    return subprocess.Popen(
        ["sh", "-c", shell, "sh", *command],
        cwd=ROOT,
        env=os.environ | {"FAKE_REPORT": "table"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def table(tmp_path: Path) -> list[dict[str, str]]:
    with next(tmp_path.glob("*/table.csv")).open() as file:
        return list(csv.DictReader(file))


def test_a_dry_run_prints_plan_and_schedule_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = with_defaults(QUICK, ["--stages", 4, "--dry-run", "--out", tmp_path / "out"])
    assert main.bench_main(argv) == 0
    text = capsys.readouterr().out
    assert "embedding" in text and "parameters" in text and "BW0" in text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_what_each_device_gets_from_every_schedule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "--preset small --framework torch --partition balanced --micro-batches 3 --dry-run"
    assert main.bench_main([*words(line), "--schedules", "interleaved,zb-v"]) == 0
    text = capsys.readouterr().out
    plan = "2 stages of 2 chunks, partition balanced, micro-batches of 6 or 5 sequences"
    devices = [
        [line.split()[0] for line in part.splitlines()[2:6]] for part in text.split(plan)[1:]
    ]
    assert devices == [["0", "1", "0", "1"], ["0", "1", "1", "0"]]
    assert text.count("largest stage: 1.013 of the mean") == 2


def test_rows_that_fail_leave_the_others_intact(tmp_path: Path) -> None:
    faults = {"FAKE_FAULTS": "paddle=raise", "FAKE_MISSING": "tensorflow"}
    run = start(tmp_path, FAKE_REPORT="whole", **faults)
    output, errors = run.communicate()
    assert run.returncode == 1, errors
    rows = {row["framework"]: row for row in table(tmp_path)}
    statuses = [rows[name]["status"] for name in ("torch", "tensorflow", "paddle")]
    assert statuses == ["ok", "skipped", "failed"]
    assert rows["torch"]["parity"] == "pass" and float(rows["torch"]["tokens_per_second"]) > 0
    assert "no_such_package is not installed; pip install tensorflow" in output
    assert "ValueError: a fault in step 1 (log: " in output
    log = next(tmp_path.glob("*/logs/paddle-1f1b-p2-m4.log"))
    assert "a fault in step 1" in log.read_text()
    results = {p.parent.name: RunResult.read(p) for p in tmp_path.glob("*/*/result.json")}
    assert results["torch-1f1b-p2-m4"].actions[1] == "F0 BW0 F1 BW1 F2 BW2 F3 BW3"
    assert results["tensorflow-1f1b-p2-m4"].status == "skipped"
    assert not list(tmp_path.glob("*/*/*.safetensors"))


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path: Path) -> None:
    run = start(tmp_path, "--frameworks", "torch")
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait() == 0, errors
    assert errors.startswith(
        "bench_all.py: standard output: Broken pipe; the work goes on without it\n"
    )
    assert [row["status"] for row in table(tmp_path)] == ["ok"]


@pytest.mark.parametrize(
    ("before", "signals"),
    [
        ("exec <&- >&- 2>&-", ()),
        (
            "trap '' CHLD INT HUP; export PYTHONWARNINGS=error PYTHONOPTIMIZE=2",
            (signal.SIGINT, signal.SIGHUP),
        ),
    ],
)
def test_what_a_shell_hands_down_does_not_end_the_work(
    tmp_path: Path, before: str, signals: tuple[signal.Signals, ...]
) -> None:
    """Closed streams; signals that are ignored, and sent; what Python reads."""
    shell = f'{before}; exec "$@"'
    run = start(tmp_path, "--frameworks", "torch", shell=shell, FAKE_REPORT="whole")
    for number in signals:
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(number)
    output, errors = run.communicate()
    assert run.returncode == 0, output + errors
    assert [row["status"] for row in table(tmp_path)] == ["ok"]


def test_native_dropout_is_shown_and_not_ranked(tmp_path: Path) -> None:
    run = start(tmp_path, "--dropout", "native", "--frameworks", "torch")
    output, errors = run.communicate()
    assert run.returncode == 0, output + errors
    (row,) = table(tmp_path)
    assert (row["status"], row["parity"], row["ratio"]) == ("ok", "not comparable", "")
    assert float(row["tokens_per_second"]) > 0
    assert "1 not comparable" in output and "oracle (NumPy" not in output
    (result,) = [RunResult.read(path) for path in tmp_path.glob("*/*/result.json")]
    assert result.parity.reason.startswith("native dropout")


def test_bfloat16_is_judged_beside_the_other_frameworks(tmp_path: Path) -> None:
    alone = start(tmp_path / "alone", "--dtype", "bfloat16", "--frameworks", "torch")
    assert alone.wait() == 0
    assert [row["parity"] for row in table(tmp_path / "alone")] == ["not checked"]
    # 0.1 % off is well below the ceiling, and far above three times what the other one errs.
    argv = ("--dtype", "bfloat16", "--frameworks", "torch,tensorflow")
    both = start(tmp_path / "both", *argv, FAKE_FAULTS="tensorflow=wrong-loss")
    output, _ = both.communicate()
    assert both.returncode == 1
    assert [row["parity"] for row in table(tmp_path / "both")] == ["pass", "FAIL"]
    assert "rule: no error more than 3 times the smallest of tensorflow, torch" in output


def test_two_schedule_files_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("0: F0 BW0\n1: F0 BW0\n")
    files = ",".join(f"file:{tmp_path / folder / 'mine.txt'}" for folder in ("a", "b"))
    argv = ["--schedules", files, "--frameworks", "torch", "--micro-batches", "1", "--no-parity"]
    run = start(tmp_path / "out", *argv)
    output, errors = run.communicate()
    assert run.returncode == 0, output + errors
    schedules = {
        RunResult.read(path).config.schedule for path in tmp_path.glob("out/*/*/result.json")
    }
    assert schedules == set(files.split(","))


def test_an_oracle_that_does_not_fit_is_skipped_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oracle_worker, "memory_bytes", lambda config: 10**18)
    implementations = {"torch": Implementation("tests.fakes.impl", "numpy", "")}
    argv = with_defaults(QUICK, ["--frameworks", "torch", "--out", tmp_path])
    assert main.bench_main(argv, implementations) == 0
    assert (
        "oracle (NumPy float64): skipped: needs about 1000000000 GB of memory"
        in capsys.readouterr().out
    )
    assert [(row["status"], row["parity"], row["ratio"]) for row in table(tmp_path)] == [
        ("ok", "not checked", "1.0")
    ]


def test_repeats_are_interleaved_and_a_difference_fails_the_run(tmp_path: Path) -> None:
    run = start(
        tmp_path, "--repeats", "2", "--frameworks", "torch,paddle", FAKE_FAULTS="paddle=wrong-loss"
    )
    output, _ = run.communicate()
    assert run.returncode == 1
    started = [
        line.split("] ")[1].split()[0] for line in output.splitlines() if line.startswith("[")
    ]
    assert started == ["oracle", "torch", "paddle", "paddle", "torch"]
    assert (
        "parity: FAIL loss_curve step=1/phase=forward/stage=1/micro_batch=all/unit=head/tensor=loss"
        in output
    )
    assert [(row["status"], row["parity"], row["ratio"]) for row in table(tmp_path)] == [
        ("ok", "pass", "1.0"),
        ("ok", "FAIL", ""),
    ]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_finished_rows_and_leaves_no_process(
    tmp_path: Path, signal_number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    run = start(tmp_path, FAKE_FAULTS="tensorflow=stubborn", FAKE_MARK=mark)
    wait_until(lambda: marked(mark), run)
    run.send_signal(signal_number)
    output, errors = run.communicate()
    assert run.returncode == 130, errors
    assert [(row["framework"], row["status"]) for row in table(tmp_path)] == [("torch", "ok")]
    assert "interrupted: 1 of 3 runs finished" in output
    assert "Traceback" not in output + errors
    assert not marked(mark)


def test_former_names_of_options_work_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evaluate", "--snapshot=/no/such/place"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("--snapshot is called --checkpoint now\n") and "/no/such/place" in said
