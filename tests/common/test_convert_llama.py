"""Llama of the transformers library: `triptych import --from llama` and `export --to llama`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from common import checkpoint
from common.checkpoint.foreign.llama import canonical
from common.cli import exchange, train
from common.harness.launch import IMPLEMENTATIONS, Implementation
from common.oracle.reference import Oracle
from common.report.result import RunResult
from common.spec.data import Batch
from common.spec.parameters import initial_weights
from common.spec.run import TrainSpec, TransformerSpec
from tests.checkpoints import same_weights
from tests.common.test_convert import in_the_cache
from tests.program import assert_refused, call

ROOT = Path(__file__).resolve().parents[2]


def llama_reference(*argv: Any) -> None:
    command = [sys.executable, "-m", "tests.references.llama_reference", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def run(*argv: Any) -> int:
    return call(argv, IMPLEMENTATIONS, exchange)


def load(source: Path, out: Path, *argv: Any) -> int:
    return run("import", source, "--from", "llama", "--out", out, *argv)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's models, their logits and gradients, and our imports of them."""
    folder = tmp_path_factory.mktemp("llama")
    llama_reference("make", folder)
    for name in ("untied", "tied"):
        argv = ("--tokenizer", "bytes")
        assert load(folder / name, folder / f"{name}-imported", *argv) == 0
    return folder


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_logits_and_gradients_are_the_librarys_own(llama: Path, name: str) -> None:
    """It computes norms, angles and softmax in float32; with those in float64 nothing is left."""
    assert len(list((llama / name).glob("*.safetensors"))) > 2  # shards and their index
    saved, batch = checkpoint.load(llama / f"{name}-imported"), np.load(llama / "tokens.npz")
    spec = saved.manifest.model
    assert (spec.kv_heads, spec.tied_head, spec.rope_theta) == (2, name == "tied", 500.0)
    oracle = Oracle(spec, TrainSpec(batch_size=4, micro_batches=1), saved.weights)
    batch = Batch(0, batch["tokens"], batch["targets"])
    logits = oracle.forward(batch)[1]["head"]
    oracle.forward_backward(batch)
    for precision, tolerance in (("as-it-comes", 1e-6), ("float64", 1e-12)):
        expected = dict(np.load(llama / f"{name}-{precision}.npz"))
        assert relative(logits, expected.pop("logits")) < tolerance
        for key, gradient in canonical(expected, spec).items():
            assert relative(oracle.gradients[key], gradient) < tolerance, (precision, key)


def test_the_library_loads_what_is_exported(llama: Path, tmp_path: Path) -> None:
    for name in ("untied", "tied"):
        out = llama / f"{name}-exported"
        assert run("export", llama / f"{name}-imported", "--to", "llama", "--out", out) == 0
        assert load(out, tmp_path / name) == 0  # and so do we
        same_weights(llama / f"{name}-imported", tmp_path / name)
    llama_reference("check", llama)


def test_training_goes_on_from_it(llama: Path, tmp_path: Path) -> None:
    """In PyTorch as in the oracle; the second step sees what the first one did to the weights."""
    losses = []
    argv = ["train", "--weights", llama / "untied-imported", "--steps", 2, "--stages", 2]
    argv += ["--batch-size", 4, "--micro-batches", 2, "--dtype", "float64", "--threads", 2]
    oracle = Implementation("tests.fakes.impl", "numpy", "")
    for name, implementation in (("torch", IMPLEMENTATIONS["torch"]), ("oracle", oracle)):
        assert call([*argv, "--out", tmp_path / name], {"torch": implementation}, train) == 0
        found = RunResult.read(next((tmp_path / name).rglob("result.json")))
        losses.append([step.loss for step in found.steps])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-11)


# ---------------------------------------------------------------------------- without the library

MODEL = TransformerSpec(
    **{"vocab_size": 11, "context_length": 6, "num_layers": 2, "d_model": 12, "num_heads": 3},
    **{"num_kv_heads": 1, "d_ff": 20, "norm_kind": "rms", "position": "rotary"},
    **{"activation": "swiglu", "biases": False},
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder as `export` makes it, whose checkpoint is `saved`."""
    saved = tmp_path / "saved"
    checkpoint.write_weights(saved, MODEL, initial_weights(MODEL, 0, "float32"), "a test")
    assert run("export", saved, "--to", "llama", "--out", tmp_path / "small") == 0
    return tmp_path / "small"


def test_it_is_found_wherever_its_users_have_it(llama: Path, small: Path, tmp_path: Path) -> None:
    assert load(in_the_cache(small, tmp_path / "models--llama"), tmp_path / "cached") == 0
    same_weights(tmp_path / "saved", tmp_path / "cached")
    assert load(llama / "bfloat16", tmp_path / "bfloat16") == 0
    low, high = (checkpoint.load(p) for p in (tmp_path / "bfloat16", llama / "tied-imported"))
    assert low.manifest.dtype == "float32" and low.manifest.model == high.manifest.model
    for name, weight in high.weights.items():
        np.testing.assert_allclose(low.weights[name], weight, rtol=2**-8, err_msg=name)


def test_configurations_of_every_age(small: Path, tmp_path: Path) -> None:
    plain = json.loads((small / "config.json").read_text())
    plain.pop("rope_theta")
    turns = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2) for i in (0, 1)}
    save_file(load_file(small / "model.safetensors") | turns, small / "model.safetensors")
    for number, (changes, theta) in enumerate(
        (
            ({}, 10_000.0),
            ({"rope_theta": 500.0, "rope_scaling": None}, 500.0),
            ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, 500.0),
            ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, 500.0),
        )
    ):
        (small / "config.json").write_text(json.dumps(plain | {"head_dim": 4} | changes))
        assert load(small, tmp_path / str(number), "--context-length", 5, "--dropout", 0.5) == 0
        spec = checkpoint.read_manifest(tmp_path / str(number)).model
        expected = {"rope_theta": theta, "context_length": 5, "dropout": 0.5}
        assert spec == MODEL.model_copy(update=expected)


def test_an_equal_head_is_tied_where_the_configuration_says_so(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((small / "config.json").read_text())
    tensors = load_file(small / "model.safetensors")
    equal = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    for number, (content, said, tied) in enumerate(
        ((equal, True, True), (equal, False, False), (tensors, True, False))
    ):
        save_file(content, small / "model.safetensors")
        (small / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": said}))
        assert load(small, tmp_path / str(number)) == 0
        assert checkpoint.read_manifest(tmp_path / str(number)).model.tied_head == tied
        assert ("the head is not tied" in capsys.readouterr().out) == (said and not tied)


def test_wrong_files_are_refused_in_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((small / "config.json").read_text())
    tensors = load_file(small / "model.safetensors")
    query = "layers.1.self_attn.q_proj"
    files: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {f"model.{query}.weight": None}, f"{query}.weight is missing"),
        ({}, {"lm_head.weight": None}, "lm_head.weight is missing; expected it where"),
        ({}, {f"model.{query}.bias": np.ones(12)}, f"{query}.bias is not part of this model"),
        ({}, {"model.norm.weight": np.ones(5)}, "norm.weight has shape [5]; expected [12]"),
        ({"num_key_value_heads": 3}, {}, "k_proj.weight has shape [4, 12]; expected [12, 12]"),
        ({"num_key_value_heads": 2}, {}, "num_kv_heads = 2 does not divide num_heads = 3"),
        ({"num_hidden_layers": 1}, {}, "is not part of this model"),
        ({"attention_bias": True}, {}, "attention_bias: Input should be False, not True"),
        ({"mlp_bias": True}, {}, "mlp_bias: Input should be False, not True"),
        ({"hidden_act": "gelu"}, {}, "hidden_act: Input should be 'silu' or 'swish', not 'gelu'"),
        ({"head_dim": 6}, {}, "head_dim = 6; expected hidden_size / num_attention_heads = 4"),
        ({"rope_scaling": {"rope_type": "llama3"}}, {}, "should be 'default', not 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, {}, "should be 'default', not 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, "should be 'default', not 'yarn'"),
        ({"hidden_size": None}, {}, "hidden_size: Field required"),
        (
            {"model_type": "gpt2", "n_head": 3},
            {},
            "model_type: Input should be 'llama', not 'gpt2'",
        ),
    ]
    for changes, other, message in files:
        content = {key: value for key, value in (config | changes).items() if value is not None}
        (small / "config.json").write_text(json.dumps(content))
        stored = {key: value for key, value in (tensors | other).items() if value is not None}
        save_file(stored, small / "model.safetensors")
        assert_refused(load(small, tmp_path / "out"), message, capsys)
    (small / "config.json").write_text(json.dumps(config))
    for option, message in {
        "--d-model 12": "--d-model: --from llama reads the model from the file",
        "--num-heads 3": "--num-heads: --from llama reads",
        "--context-length 7": "config.json has max_position_embeddings = 6; expected at most that",
    }.items():
        assert_refused(load(small, tmp_path / "out", *option.split()), message, capsys)
    (small / "config.json").unlink()
    message = "no config.json beside it; expected a Llama's"
    assert_refused(load(small, tmp_path / "out"), message, capsys)


def test_its_tokenizer_goes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str().encode()
    weights = initial_weights(MODEL, 0, "float32")
    checkpoint.write_weights(tmp_path / "saved", MODEL, weights, "a test", content)
    assert run("export", tmp_path / "saved", "--to", "llama", "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert load(tmp_path / "out", tmp_path / "back") == 0
    assert checkpoint.read_tokenizer(tmp_path / "back") == content
    assert run("export", tmp_path / "saved", "--to", "llama", "--out", tmp_path / "out") == 2
    assert "exists; expected a new folder" in capsys.readouterr().err


def test_no_python_is_named_where_no_framework_starts(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, out = f"torch={sys.executable}", tmp_path / "out"
    argvs = (
        ("export", tmp_path / "saved", "--to", "llama", "--out", out, "--python", python),
        ("import", small, "--from", "llama", "--out", out, "--python", python),
    )
    for argv in argvs:
        assert_refused(run(*argv), "starts no framework; expected without it", capsys)
    assert not out.exists()


def test_another_model_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = {"norm": "post", "activation": "gelu", "biases": True, "causal": False}
    for field, value in others.items():
        spec = MODEL.model_copy(update={field: value})
        saved = tmp_path / field
        checkpoint.write_weights(saved, spec, initial_weights(spec, 0, "float32"), "a test")
        status = run("export", saved, "--to", "llama", "--out", tmp_path / "out")
        assert_refused(status, f"{field} = {value}: not a Llama's", capsys)
    assert {path.name for path in tmp_path.iterdir()} == {*others}
