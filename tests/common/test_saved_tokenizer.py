"""A checkpoint carries its tokenizer; no subcommand makes another one of what lies at a path. With
the oracle for a framework.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import checkpoint
from common.checkpoint.foreign.gpt2 import foreign_shapes
from common.cli import exchange, inference, main, train
from common.harness.launch import ORACLE_MODULE, run_jobs_in_worker
from common.report.result import RunResult
from common.runtime.job import Job
from common.runtime.oracle_worker import OracleEngine
from common.runtime.text import write_text
from common.spec.data import Corpus, load_corpus
from common.spec.run import RunConfig, TrainSpec, TransformerSpec
from common.spec.text import read_texts
from tests.program import MORTAL, SMALL, assert_refused, call, with_defaults, words

BYTES = with_defaults(SMALL, ())
BYTE_PAIRS = [*BYTES, "--tokenizer", "bpe", "--vocab-size", "300"]
GREEDY = "generate --checkpoint {} --prompt {!r} --tokens {} --greedy --json"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_MARK", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    manual = "".join(read_texts(()).decoded(lambda more_bytes: None))
    Path("text").write_text(manual[:100_000])
    Path("other").write_text(manual[200_000:300_000])


def run(*argv: Any) -> int:
    if argv[0] in ("dump", "bisect"):
        return main.main(list(map(str, argv)))
    return call(argv, MORTAL, train, inference, exchange)


def trained(folder: str, steps: int, *argv: Any) -> tuple[Path, list[float]]:
    """The last checkpoint and the losses of a run into `folder`."""
    places = ("--out", f"{folder}-results", "--save-dir", folder)
    assert run("train", *places, "--steps", steps, *argv) == 0
    results = Path(f"{folder}-results").glob("*/*/result.json")
    newest = RunResult.read(max(results, key=lambda path: path.stat().st_mtime_ns))
    return checkpoint.checkpoints_in(Path(folder))[-1], [step.loss for step in newest.steps]


def refused(capsys: pytest.CaptureFixture[str], message: str, *argv: Any) -> None:
    capsys.readouterr()
    assert_refused(run(*argv), message, capsys)


def test_a_run_goes_on_with_the_tokenizer_of_its_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = ["--corpus", "text"]
    _, whole = trained("whole", 4, *BYTE_PAIRS, *corpus)
    saved, first = trained("parts", 2, *BYTE_PAIRS, *corpus)
    config = RunConfig.model_validate(
        {"corpus": ["text"], "tokenizer": "bpe", "model": {"vocab_size": 300}}
    )
    assert (saved / "tokenizer.json").read_bytes() == load_corpus(config).tokenizer
    assert Tokenizer.from_file(str(saved / "tokenizer.json")).get_vocab_size() == 300
    shutil.move("text", "moved")
    refused(capsys, "text: No such file", "train", "--resume", saved, "--steps", 4)
    shutil.copy("other", "text")
    for again in ([], ["--corpus", "other"], ["--corpus", "text", "moved"]):
        message = "is not the text that it was trained on"
        refused(capsys, message, "train", "--resume", saved, "--steps", 4, "--out", "none", *again)
    assert not Path("none").exists()
    last, second = trained("parts", 4, "--resume", "latest", "--corpus", "moved")
    assert first + second == whole
    assert (last / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_evaluate_wants_the_text_or_another_one_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    saved, _ = trained("run", 2, *BYTE_PAIRS, "--corpus", "text")
    argv = ("evaluate", "--checkpoint", saved, "--json", "--batches", 3)

    def loss(*more: Any) -> float:
        capsys.readouterr()
        assert run(*argv, *more) == 0
        return float(json.loads(capsys.readouterr().out)["loss"])

    right = loss()
    shutil.move("text", "moved")
    shutil.copy("other", "text")
    refused(capsys, "text is not the text that it was trained on", *argv)
    assert loss("--corpus", "moved") == right
    engine = OracleEngine(RunConfig(tokenizer="bpe", model=checkpoint.read_manifest(saved).model))
    engine.reset(checkpoint.load(saved).weights)
    config = RunConfig.model_validate(
        {"corpus": ["other"], "tokenizer": "bpe", "tokenizer_file": str(saved / "tokenizer.json")}
        | {"model": checkpoint.read_manifest(saved).model.model_dump()}
    )
    batches = list(load_corpus(config).held_out_batches(4, 8))[:3]
    expected = np.mean([engine.evaluate(batch) for batch in batches])
    assert loss("--corpus", "other") == pytest.approx(float(expected), rel=1e-12)
    assert run(*argv[:3], "--batches", 1, "--corpus", "other") == 0
    assert "the last tenth of another text than it was trained on: other" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_generate_needs_no_text(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = BYTES if tokenizer == "bytes" else BYTE_PAIRS
    saved, _ = trained("run", 2, *argv, "--corpus", "text")

    def generated() -> Any:
        capsys.readouterr()
        assert run(*words(GREEDY.format(saved, "The class", 9))) == 0
        found = json.loads(capsys.readouterr().out)
        return found["texts"], found["tokens"]

    before = generated()
    Path("text").write_text("another text " * 100)
    changed_text = generated()
    Path("text").unlink()
    assert before == changed_text == generated()
    assert before[0][0].startswith("The class")


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, _ = trained("run", 2, *BYTE_PAIRS, "--corpus", "text")
    other, _ = trained("other-run", 1, *BYTE_PAIRS, "--corpus", "other")
    subcommands: list[tuple[Any, ...]] = [
        ("train", "--steps", 4, "--out", "none", "--resume"),
        ("evaluate", "--checkpoint"),
        ("generate", "--prompt", "x", "--checkpoint"),
    ]
    for subcommand in subcommands:
        refused(capsys, "has its own tokenizer (bpe)", *subcommand, saved, "--tokenizer", "bytes")
        file = ("--tokenizer-file", other / "tokenizer.json")
        refused(capsys, "has its own tokenizer (bpe)", *subcommand, saved, *file)
    own = ["--tokenizer-file", str(saved / "tokenizer.json")]
    assert run("generate", "--checkpoint", saved, "--prompt", "x", "--tokens", 2, *own) == 0
    subcommands.append(("export", "--to", "torch", "--out", "model.pt"))
    content = (saved / "tokenizer.json").read_bytes()
    changed = content.replace(b'"!"', b'"?"', 1)
    cut = f"has {len(content) - 5} bytes; expected {len(content)}"
    for damage, message in (
        (lambda path: path.write_bytes(changed), "tokenizer.json: SHA-256 differs"),
        (lambda path: path.write_bytes(content[:-5]), cut),
        (lambda path: path.unlink(), "tokenizer.json: No such file"),
        (lambda path: path.symlink_to("/etc/passwd"), "tokenizer.json: a link"),
    ):
        damage(saved / "tokenizer.json")
        for subcommand in subcommands:
            refused(capsys, message, *subcommand, saved)
    assert not Path("none").exists()


def test_older_checkpoints_are_trained_anew_from_their_text_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, first = trained("run", 2, *BYTE_PAIRS, "--corpus", "text")
    _, whole = trained("whole", 4, *BYTE_PAIRS, "--corpus", "text")
    content = json.loads((saved / "manifest.json").read_text())
    del content["tokenizer"]
    (saved / "manifest.json").write_text(json.dumps(content | {"schema_version": 1}))
    (saved / "tokenizer.json").unlink()
    wish = ("generate", "--checkpoint", saved, "--prompt", "The class", "--tokens", 3)
    assert run(*wish) == 0
    shutil.move("text", "moved")
    shutil.copy("other", "text")
    for argv in (
        wish,
        (*wish, "--corpus", "other"),
        ("evaluate", "--checkpoint", saved, "--corpus", "other"),
    ):
        refused(
            capsys, "it has no tokenizer but by that text; expected --corpus FILE with it", *argv
        )
    assert run(*wish, "--corpus", "moved") == 0
    last, second = trained("run", 4, "--resume", "latest", "--corpus", "moved")
    assert first + second == whole and (last / "tokenizer.json").exists()


def test_the_manual_of_another_python_is_another_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, _ = trained("run", 1, *BYTES)
    topics: dict[str, str] = pydoc_data.topics.topics
    monkeypatch.setitem(topics, "class", topics["class"] + "More in Python 3.99.")
    for subcommand in (
        ("train", "--steps", 4, "--resume", saved),
        ("evaluate", "--checkpoint", saved),
    ):
        refused(capsys, "the manual of Python 3.", *subcommand)
    assert run("generate", "--checkpoint", saved, "--prompt", "x", "--tokens", 1) == 0


# --------------------------------------------------------------------------------- imported weights

SIZES = {"context_length": 12, "num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 8}
MODEL = TransformerSpec(vocab_size=320, activation="gelu_tanh", tied_head=True, **SIZES)


def gpt2(folder: Path, vocab_size: int = MODEL.vocab_size) -> Any:
    """A GPT-2 with a padded vocabulary, and its tokenizer, which is not written."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = foreign_shapes(MODEL.model_copy(update={"vocab_size": vocab_size}))
    save_file(
        {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([Path("other").read_text()], trainer)
    return made


def test_imported_weights_keep_the_meaning_of_their_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fine-tuned on a text that is not the tokenizer's: the first loss is that of the library's
    tokens.
    """
    made = gpt2(Path("gpt2"))
    made.save("gpt2/tokenizer.json")
    importing = ("import", "gpt2/model.safetensors", "--from", "gpt2", "--num-heads", 2, "--out")
    assert run(*importing, "known") == 0
    assert "tokenizer: gpt2/tokenizer.json, 310 tokens" in capsys.readouterr().out
    shutil.move("gpt2/tokenizer.json", "tokenizer.json")
    assert run(*importing, "unknown") == 0
    assert "tokenizer: not known" in capsys.readouterr().out
    fine_tuning = words("--batch-size 4 --micro-batches 2 --corpus text --seed 3 --resume")
    saved, (loss, *_) = trained("a", 2, *fine_tuning, "known")
    _, given = trained("b", 2, *fine_tuning, "unknown", "--tokenizer-file", "tokenizer.json")
    tokens = np.array(made.encode(Path("text").read_text()).ids)
    train_spec = TrainSpec(batch_size=4, micro_batches=2, dtype="float64", seed=3)
    config = RunConfig(model=MODEL, train=train_spec, tokenizer="bpe")
    engine = OracleEngine(config)
    engine.reset(checkpoint.load(Path("known")).weights)
    batch = Corpus(tokens, "", 0).training_batch(config, 0)
    assert loss == given[0] == pytest.approx(engine.forward_backward(batch), rel=1e-12)
    assert (saved / "tokenizer.json").read_bytes() == Path("tokenizer.json").read_bytes()
    Path("text").unlink()
    capsys.readouterr()
    assert run(*words(GREEDY.format(saved, "Ein Schrödinger", 5))) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == made.encode("Ein Schrödinger").ids


def test_what_imported_tokens_mean_is_never_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    made = gpt2(Path("gpt2"), 256)  # not bytes, though it has as many
    importing = ("import", "gpt2/model.safetensors", "--from", "gpt2", "--num-heads", 2, "--out")
    assert run(*importing, "saved") == 0
    training = ("train", "--steps", 2, "--out", "results", "--batch-size", 4, "--resume", "saved")
    evaluating = ("evaluate", "--batches", 1, "--checkpoint", "saved")
    writing = ("generate", "--checkpoint", "saved", "--tokens", 2)
    for subcommand in (training, evaluating, (*writing, "--prompt", "x")):
        message = "imported weights without a tokenizer; expected --tokenizer-file FILE"
        refused(capsys, message, *subcommand)
        message = "weights for a vocabulary that exists already"
        refused(capsys, message, *subcommand, "--tokenizer", "bpe")
        assert run(*subcommand, "--tokenizer", "bytes") == 0
    assert run(*writing, "--prompt-tokens", "1,2") == 0
    made.save("tokenizer.json")
    too_large = "tokenizer.json: has 310 tokens, added and special ones included; the model has "
    too_large += "vocab_size = 256"
    for subcommand in (training, evaluating, (*writing, "--prompt", "x"), (*importing, "none")):
        refused(capsys, too_large, *subcommand, "--tokenizer-file", "tokenizer.json")
    assert run(*importing, "as-bytes", "--tokenizer", "bytes") == 0
    assert run("evaluate", "--batches", 1, "--checkpoint", "as-bytes") == 0
    shutil.move("tokenizer.json", "gpt2/tokenizer.json")
    capsys.readouterr()
    assert run(*importing, "misfit") == 0
    unknown = "tokenizer: not known: tokenizer gpt2/tokenizer.json: has 310 tokens"
    assert unknown in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- workers


def test_workers_read_no_text_and_train_no_tokenizer(tmp_path: Path) -> None:
    model = {"vocab_size": 300, "context_length": 8, "d_model": 8}
    train = {"steps": 2, "batch_size": 4, "micro_batches": 2}
    config = RunConfig.model_validate(
        {"corpus": ["text"], "tokenizer": "bpe", "model": model, "train": train}
    )
    text = write_text(load_corpus(config), tmp_path / "kept")
    Path("text").unlink()
    jobs = [Job(config=config, out=str(tmp_path / name), text=text) for name in ("a", "b")]
    outcomes = run_jobs_in_worker(ORACLE_MODULE, jobs, tmp_path, 300.0)
    assert [outcome.reason for outcome in outcomes] == ["", ""]
    part = outcomes[0].parts[0]
    assert part.corpus_digest == text.digest and len(part.tokenizer_digest) == 64


def test_a_run_is_dumped_again_with_its_own_text_or_not_at_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*BYTE_PAIRS, "--framework", "oracle"]
    for name, corpus in (("a", "text"), ("b", "other")):
        assert run("dump", *argv, "--corpus", corpus, "--out", f"{name}.safetensors") == 0
    message = "are other tokens in A and B; expected runs of one text"
    refused(capsys, message, "bisect", "a.safetensors", "b.safetensors")
    trained("run", 1, *BYTE_PAIRS, "--corpus", "text")
    (result,) = Path("run-results").glob("*/*/result.json")
    assert (result.parent / "tokenizer.json").exists() and not list(result.parent.glob("*.npy"))
    Path("text").write_text("another text " * 999)
    refused(capsys, "its corpus has changed since", "bisect", "a.safetensors", result.parent)
