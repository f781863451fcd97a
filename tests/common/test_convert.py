"""Weights to and from other people's files: the subcommands, and GPT-2 of the transformers library.

Each framework's own files are for `test_convert.py` in the frameworks' folders.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import checkpoint
from common.checkpoint.foreign.gpt2 import foreign_shapes
from common.cli import exchange
from common.harness.launch import IMPLEMENTATIONS, Implementation, run_jobs_in_worker
from common.runtime.job import Generation, Job
from common.runtime.oracle_worker import OracleEngine
from common.spec.parameters import random_arrays
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from tests.campaigns import fuzz_importers
from tests.checkpoints import same_weights
from tests.program import assert_refused, call

ROOT = Path(__file__).resolve().parents[2]
MODEL = TransformerSpec(
    context_length=6, num_layers=2, d_model=12, num_heads=2, d_ff=20, tied_head=True, dropout=0.1
)
TRAIN = TrainSpec(batch_size=4, micro_batches=2, dtype="float64")


def gpt2_reference(*argv: Any) -> str:
    command = [sys.executable, "-m", "tests.references.gpt2_reference", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def run(*argv: Any, implementations: Mapping[str, Implementation] = IMPLEMENTATIONS) -> int:
    return call(argv, implementations, exchange)


def import_gpt2(place: Path, out: Path, *argv: Any) -> int:
    return run("import", place, "--from", "gpt2", "--out", out, *argv)


def logits_of(folder: Path, tokens: Any) -> Any:
    saved = checkpoint.load(folder)
    engine = OracleEngine(RunConfig(model=saved.manifest.model, train=TRAIN, tokenizer="bpe"))
    engine.reset(saved.weights)
    return engine.predict(tokens)


def test_the_subcommands_start_the_framework(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.write_weights(
        tmp_path / "saved", MODEL, random_arrays(MODEL, 1, "float32", 0.5), "a test"
    )
    file = tmp_path / "model.pt"
    options = ["--tied-head", "--d-model", 12, "--d-ff", 20, "--context-length", 6]
    assert run("export", saved, "--to", "torch", "--out", file) == 0
    assert run("import", file, "--from", "torch", "--out", tmp_path / "back", *options) == 0
    for name, value in checkpoint.load(tmp_path / "back").weights.items():
        np.testing.assert_array_equal(value, checkpoint.load(saved).weights[name])
    capfd.readouterr()
    other = ("--out", tmp_path / "no", *options, "--norm", "post")
    status = run("import", file, "--from", "torch", *other)
    assert_refused(status, "head.norm.bias is not part of this model", capfd)
    assert run("export", saved, "--to", "torch", "--out", file) == 2
    assert "exists; expected a new file" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model.pt", "saved"]


# -------------------------------------------------------------------------------------------- GPT-2


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's model, its logits and its greedy text, and our import of it."""
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2_reference("make", folder)
    assert import_gpt2(folder / "gpt2" / "model.safetensors", folder / "imported") == 0
    return folder


def test_gpt2s_logits_are_the_librarys_own(gpt2: Path) -> None:
    expected = np.load(gpt2 / "expected.npz")
    spec = checkpoint.read_manifest(gpt2 / "imported").model
    said = (spec.num_heads, spec.activation, spec.tied_head, spec.vocab_size)
    assert said == (3, "gelu_tanh", True, 301)
    found = logits_of(gpt2 / "imported", expected["tokens"])
    assert np.linalg.norm(found - expected["logits"]) < 1e-8 * np.linalg.norm(expected["logits"])
    assert "relative difference" in gpt2_reference("check", gpt2)


# PyTorch is left out: its logits are compared above.
@pytest.mark.parametrize("framework", ["tensorflow", "paddle"])
def test_gpt2_continues_as_the_library_does(gpt2: Path, framework: str, tmp_path: Path) -> None:
    text = np.load(gpt2 / "expected.npz")["text"][0].tolist()
    model = checkpoint.read_manifest(gpt2 / "imported").model
    train = {"batch_size": 1, "micro_batches": 1, "dtype": "float64"}
    run = {"framework": framework, "stages": 2, "threads": 2, "tokenizer": "bpe"}
    config = RunConfig.model_validate(run | {"model": model, "train": train})
    wish = Generation(prompt=tuple(text[:4]), tokens=len(text) - 4)
    resume = str(gpt2 / "imported")
    job = Job(config=config, out=str(tmp_path), kind="generate", resume=resume, generation=wish)
    outcome = run_jobs_in_worker(IMPLEMENTATIONS[framework].module, [job], tmp_path)[0]
    assert outcome.reason == ""
    found = json.loads((tmp_path / "generation.json").read_text())
    assert found["tokens"] == [text[4:]] and found["closest_call"] > 1e-6


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder as the library saves it, of random weights."""
    sizes = {"context_length": 5, "num_layers": 2, "d_model": 6, "num_heads": 3, "d_ff": 7}
    shapes = foreign_shapes(TransformerSpec(vocab_size=11, tied_head=True, **sizes))
    random, folder = np.random.default_rng(0), tmp_path / "small"
    folder.mkdir()
    tensors = {f"transformer.{name}": random.standard_normal(s) for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"n_head": 3, "activation_function": "gelu_new"}')
    return folder


def in_the_cache(small: Path, model: Path) -> Path:
    """The library's model as the Hugging Face cache keeps it; returns its revision's folder."""
    revision = model / "snapshots" / "0123abc"
    revision.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(small / name, model / "blobs" / f"b{number}")
        (revision / name).symlink_to(Path("../../blobs") / f"b{number}")
    return revision


def in_shards(
    small: Path, folder: Path, places: tuple[str, str] = ("a.safetensors", "b.safetensors")
) -> Path:
    """The same in two files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(small / "config.json", folder)
    tensors = sorted(load_file(small / "model.safetensors").items())
    for part, place in enumerate(places):
        (folder / place).parent.mkdir(exist_ok=True)
        save_file(dict(tensors[part::2]), folder / place)
    weight_map = {name: places[n % 2] for n, (name, _) in enumerate(tensors)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def test_gpt2_is_found_wherever_its_users_have_it(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = in_the_cache(small, tmp_path / "hub" / "models--gpt2")
    (tmp_path / "link.safetensors").symlink_to(small / "model.safetensors")
    in_shards(small, tmp_path / "shards", ("a.safetensors", "sub/b.safetensors"))
    cached = in_shards(small, tmp_path / "hub" / "models--gpt2" / "snapshots" / "456def")
    shard = cached.parent / "a.safetensors"
    shard.rename(tmp_path / "hub" / "models--gpt2" / "blobs" / "shard")
    shard.symlink_to("../../blobs/shard")
    elsewhere = (tmp_path / "link.safetensors", tmp_path / "shards", cached)
    places = (small, revision, revision / "model.safetensors", *elsewhere)
    for number, place in enumerate(places):
        assert import_gpt2(place, tmp_path / f"out-{number}") == 0, capsys.readouterr().err
        same_weights(tmp_path / "out-0", tmp_path / f"out-{number}")


def test_gpt2_as_pytorch_pickles_it(
    gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_gpt2(gpt2 / "bin", tmp_path / "bin") == 0, capfd.readouterr().err
    same_weights(gpt2 / "imported", tmp_path / "bin")
    capfd.readouterr()
    argv = ("--num-heads", 3, "--dropout", 0.25)
    assert import_gpt2(gpt2 / "checkpoint.pt", tmp_path / "wrapped", *argv) == 0
    said = capfd.readouterr().out
    for line in (
        "note: the weights are those under 'model'; not read: epoch, optimizer\n",
        "note: 'module' (DistributedDataParallel) was taken off",
        "'_orig_mod' (torch.compile)",
        "note: no config.json says activation = gelu_tanh, norm_epsilon = 1e-05; taken as in GPT-2",
    ):
        assert line in said
    wrapped, plain = (checkpoint.load(place) for place in (tmp_path / "wrapped", gpt2 / "imported"))
    assert wrapped.manifest.model == plain.manifest.model.model_copy(update={"dropout": 0.25})
    for name, value in plain.weights.items():
        np.testing.assert_array_equal(wrapped.weights[name], value)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../a.safetensors", "leads out of the model's folder"),
        ("sub/../../a.safetensors", "leads out of the model's folder"),
        ("..\\a.safetensors", "leads out of the model's folder"),
        ("C:\\a.safetensors", "leads out of the model's folder"),
        ("/etc/passwd", "leads out of the model's folder"),
        ("", "leads out of the model's folder"),
        ("a.safetensors\0", "leads out of the model's folder"),
        ("none.safetensors", "No such file or directory"),
        ("out.safetensors", "is a link out of the model's folder"),
        ("circle.safetensors", "circle of links"),
        ("sub", "not a plain file"),
        ("./sub/../a.safetensors", ""),
    ],
)
def test_an_index_names_files_of_its_own_folder(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shard: str, message: str
) -> None:
    index = in_shards(small, tmp_path / "model")
    (index.parent / "sub").mkdir()
    shutil.copy(index.parent / "a.safetensors", tmp_path / "a.safetensors")
    (index.parent / "out.safetensors").symlink_to("../a.safetensors")
    (index.parent / "circle.safetensors").symlink_to("circle.safetensors")
    index.write_text(index.read_text().replace('"a.safetensors"', json.dumps(shard)))
    status = import_gpt2(index, tmp_path / "out")
    if message:
        assert_refused(status, message, capsys)
    else:
        assert status == 0, capsys.readouterr().err


def test_what_gpt2s_file_decides_is_no_option(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, message in {
        "--d-model banana": "--d-model: --from gpt2 reads the model from the file",
        "--tied-head": "--tied-head: --from gpt2 reads",
        "--preset tiny": "--preset: --from gpt2 reads",
        "--num-heads 4": "num_heads = 4: config.json has n_head = 3",
        "--num-heads \N{SUPERSCRIPT THREE}": "expected a whole number, at least 1",
        "--activation relu": "activation = relu: config.json has activation_function = gelu_tanh",
        "--dropout 2": "expected a number, at least 0.0 and less than 1.0",
    }.items():
        assert_refused(import_gpt2(small, tmp_path / "out", *option.split()), message, capsys)
    shutil.copy(small / "model.safetensors", tmp_path / "copy.safetensors")
    status = import_gpt2(tmp_path / "copy.safetensors", tmp_path / "out")
    assert_refused(status, "how many heads? add --num-heads", capsys)
    inside = tmp_path / "hub" / "snapshots" / "1"
    inside.mkdir(parents=True)
    status = import_gpt2(tmp_path / "hub", tmp_path / "out")
    assert_refused(status, f"no model in this folder; expected {inside}", capsys)


def test_gpt2_variants_of_the_file(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(gpt2 / "gpt2" / "model.safetensors")
    assert any(name.startswith("transformer.") for name in tensors)
    short = {
        name.removeprefix("transformer."): array.astype(np.float32)
        for name, array in tensors.items()
    }
    short |= {
        "lm_head.weight": short["wte.weight"],
        "h.0.attn.bias": np.ones((1, 1, 12, 12), np.uint8),
        "transformer.h.1.attn.bias": np.ones((1, 1, 12, 12), np.bool_),
        "h.1.attn.masked_bias": np.ones((), np.int64),
    }

    def attempt(name: str, changes: dict[str, Any], *argv: Any) -> int:
        content = {key: value for key, value in (short | changes).items() if value is not None}
        save_file(content, tmp_path / f"{name}.safetensors")
        capsys.readouterr()
        return import_gpt2(tmp_path / f"{name}.safetensors", tmp_path / name, *argv)

    three = ("--num-heads", 3)
    assert attempt("plain", {}, *three) == 0
    saved = checkpoint.load(tmp_path / "plain")
    assert saved.manifest.dtype == "float32" and saved.manifest.model.tied_head
    untied = short["wte.weight"] + np.float32(1)
    assert attempt("untied", {"lm_head.weight": untied}, *three) == 0
    head = checkpoint.load(tmp_path / "untied").weights["head.output.weight"]
    np.testing.assert_array_equal(head, untied.T)
    # bfloat16, which NumPy lacks: the upper halves of float32
    in_float32 = {name: array for name, array in short.items() if array.dtype == np.float32}
    halves = {name: array.view(np.uint32) >> 16 for name, array in in_float32.items()}
    header, data = {}, b""
    for name, half in halves.items():
        raw = half.astype("<u2").tobytes()
        place = (len(data), len(data) + len(raw))
        header[name] = {"dtype": "BF16", "shape": half.shape, "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "low.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert import_gpt2(tmp_path / "low.safetensors", tmp_path / "low", *three) == 0
    upper = {name: (half << 16).view(np.float32) for name, half in halves.items()}
    assert attempt("upper", upper, *three) == 0
    low, high = (checkpoint.load(tmp_path / name) for name in ("low", "upper"))
    assert low.manifest.dtype == "float32" and low.manifest.model == high.manifest.model
    for name, weight in high.weights.items():
        np.testing.assert_array_equal(low.weights[name], weight, err_msg=name)
    wrong: dict[str, tuple[str, Any]] = {
        "h.1.ln_1.bias is missing": ("h.1.ln_1.bias", None),
        "h.1.other is not part of this model": ("h.1.other", untied),
        "ln_f.bias has shape [5]; expected [24]": ("ln_f.bias", untied[0, :5].copy()),
        "expected float32": ("ln_f.bias", np.ones(24, np.int64)),
        "head.norm.bias has values that are not": ("ln_f.bias", np.full(24, np.nan)),
        "are not finite in float32": ("ln_f.bias", np.full(24, 1e300)),
        "wte.weight is missing": ("wte.weight", None),
    }
    for number, (message, (name, value)) in enumerate(wrong.items()):
        assert_refused(attempt(f"wrong-{number}", {name: value}, *three), message, capsys)
    assert_refused(attempt("heads", {}), "how many heads? add --num-heads", capsys)
    message = "num_heads = 5 does not divide d_model = 24"
    assert_refused(attempt("odd", {}, "--num-heads", 5), message, capsys)
    for text, message in {
        '{"activation_function": ["gelu"]}': "activation_function: Input should be 'gelu_new', "
        "'gelu_pytorch_tanh', ",
        '{"n_head": "many"}': "n_head: Input should be a valid integer",
        '{"scale_attn_weights": false}': "scale_attn_weights: Input should be True, not False",
        '{"n_head": 3, "n_layer": 7}': "num_layers = 3 by its tensors; config.json says n_layer = "
        "7; expected the same",
        '{"n_head": 3, "model_type": "gptj"}': "model_type: Input should be 'gpt2', not 'gptj'",
        "[]": "config.json: Input should be an object, not []",
    }.items():
        (tmp_path / "config.json").write_text(text)
        assert_refused(attempt("configured", {}), message, capsys)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    status = import_gpt2(tmp_path / "junk.safetensors", tmp_path / "junk")
    assert_refused(status, "not a safetensors file", capsys)


@pytest.mark.parametrize("module", list(fuzz_importers.FILES))
def test_hostile_files_are_refused_in_one_line(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz_importers.main(["--only", module, "--inputs", "100"]) == 0, capsys.readouterr().out


def test_a_file_that_crashes_its_reader_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "crashing").mkdir()
    (tmp_path / "crashing" / "convert.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (tmp_path / "model.pt").write_bytes(b"x")
    crashing = {"torch": Implementation("crashing", "numpy", "")}
    argv = ("import", tmp_path / "model.pt", "--from", "torch", "--out", tmp_path / "out")
    status = run(*argv, implementations=crashing)
    assert_refused(status, "model.pt: reading it ended with SIGSEGV; expected", capsys)
