"""Evaluating and generating: the choice of tokens, the subcommands, and the same tokens from every
framework.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint
from common.cli import inference
from common.harness.launch import Implementation
from common.runtime.inference import Writing
from common.runtime.job import Generation
from common.runtime.oracle_worker import OracleEngine
from common.runtime.sampling import kept_tokens, pick, uniform
from common.spec.data import IGNORED, load_corpus, load_tokenizer
from common.spec.parameters import initial_weights, random_arrays
from common.spec.run import FRAMEWORKS, RunConfig, TrainSpec, TransformerSpec
from tests.program import MORTAL, assert_refused, call, words

MODEL = TransformerSpec(context_length=24, num_layers=2, d_model=16, num_heads=2, d_ff=24)
CONFIG = RunConfig(model=MODEL, train=TrainSpec(batch_size=4, micro_batches=2, dtype="float64"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_MARK", str(tmp_path))


def weights() -> dict[str, Any]:
    """Noisy enough for the next token to depend on all that was before it."""
    noise = random_arrays(MODEL, 5, "float64", 0.5)
    return {
        name: value + noise[name] for name, value in initial_weights(MODEL, 0, "float64").items()
    }


def run(*argv: Any, implementations: Any = MORTAL) -> int:
    return call(argv, implementations, inference)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.write_weights(tmp_path / "saved", MODEL, weights(), "a test", b"")


# -------------------------------------------------------------------------------------- which token


def wish(**changes: Any) -> Generation:
    return Generation(prompt=(1,), tokens=1, **changes)


def test_greedy_takes_the_lower_of_equals_and_says_how_close_it_was() -> None:
    assert pick(np.array([0.0, 2.0, 2.0, 1.0]), wish(), 0, 0) == (1, 0.0)
    assert pick(np.array([0.0, 2.0, 1.5]), wish(), 0, 0) == (1, 0.5)


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.0001, 0.1999]))

    def drawn(count: int, **changes: Any) -> list[int]:
        return [pick(logits, wish(**changes), 0, position)[0] for position in range(count)]

    shares = np.bincount(drawn(4000, temperature=1.0, seed=3), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.exp(logits), atol=0.02)
    cold = drawn(4000, temperature=0.25, seed=3).count(0) / 4000
    np.testing.assert_allclose(cold, 0.5**4 / (0.5**4 + 0.3**4 + 0.2**4), atol=0.02)
    assert set(drawn(500, temperature=1.0, top_k=2)) == {0, 1}
    assert set(drawn(500, temperature=1.0, top_p=0.6)) == {0, 1}
    assert set(drawn(500, temperature=1.0, top_k=3, top_p=0.99)) == {0, 1, 3}


def test_the_seeds_of_old_give_the_tokens_that_they_gave() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, 50))
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "seed": 7}
    found = [pick(row, wish(**options), 2, place)[0] for place, row in enumerate(logits)]
    assert found == [41, 24, 39, 14, 47, 20]


def test_top_p_says_how_close_the_next_token_was() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    kept, call = kept_tokens(logits, wish(temperature=1.0, top_p=0.79))
    assert kept.tolist() == [True, True, False] and call == pytest.approx(0.01)
    # A tie where the cut is: the lower token, by nothing.
    kept, call = kept_tokens(np.zeros(4), wish(temperature=1.0, top_p=0.6))
    assert kept.tolist() == [True, True, True, False] and call == 0


def test_a_choice_depends_on_seed_sample_and_position_only() -> None:
    numbers = {which: uniform(*which) for which in itertools.product((0, 1), repeat=3)}
    assert len(set(numbers.values())) == len(numbers)
    assert uniform(0, 1, 1) == numbers[0, 1, 1]
    assert uniform(7, 0, 3) == pytest.approx(0.4417, abs=1) and 0 <= uniform(7, 0, 3) < 1


def test_logits_that_are_not_finite_choose_no_token() -> None:
    writing = Writing(wish(num_beams=2), 24, 1)
    writing.feed(0, None)
    with pytest.raises(FloatingPointError, match="logits that are not finite"):
        writing.feed(0, np.array([[0.0, np.nan]]))


def test_held_out_batches_ask_for_every_token_once() -> None:
    corpus = load_corpus(CONFIG)
    batches = list(corpus.held_out_batches(4, 24))
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    inputs = np.concatenate([batch.inputs.ravel() for batch in batches])
    count = len(corpus.held_out) - 1
    np.testing.assert_array_equal(targets[:count], corpus.held_out[1:])
    np.testing.assert_array_equal(inputs[:count], corpus.held_out[:-1])
    assert (targets[count:] == IGNORED).all()
    assert {batch.inputs.shape for batch in batches} == {(4, 24)}
    assert all(batch.num_tokens for batch in batches)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_text_becomes_tokens_and_text_again(tokenizer: str) -> None:
    vocab_size = 256 if tokenizer == "bytes" else 400
    model = MODEL.model_copy(update={"vocab_size": vocab_size})
    config = CONFIG.model_copy(update={"tokenizer": tokenizer, "model": model})
    both = load_tokenizer(config)
    tokens = both.encode("Schrödinger's class")
    assert both.decode(tokens) == "Schrödinger's class" and max(tokens) < vocab_size


# ---------------------------------------------------------------------------------- the subcommands


def test_evaluate_prints_loss_and_perplexity(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", "--checkpoint", saved, "--batches", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    engine = OracleEngine(CONFIG)
    engine.reset(weights())
    batches = list(load_corpus(CONFIG).held_out_batches(8, 24))[:3]
    losses = [engine.evaluate(batch) for batch in batches]
    assert found["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == 3 * 8 * 24
    short = words("--batches 1 --stages 1 --framework paddle")
    assert run("evaluate", "--checkpoint", saved, *short) == 0
    assert "perplexity" in (text := capsys.readouterr().out) and "paddle, 1 stages, 1f1b" in text


def test_an_encoder_is_evaluated_on_the_same_masked_tokens_and_generates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODEL.model_copy(update={"causal": False})
    encoder = checkpoint.write_weights(tmp_path / "encoder", model, weights(), "a test", b"")
    assert run("evaluate", "--checkpoint", encoder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(encoder)
    engine, corpus = OracleEngine(CONFIG.model_copy(update={"model": model})), load_corpus(CONFIG)
    engine.reset(weights())
    total, count = 0.0, 0
    for index, plain in enumerate(corpus.held_out_batches(4, 24)):  # the subcommand has 8 at once
        batch = corpus.masked(plain, model, (0, 5), 4 * index)
        count += batch.num_tokens
        total += engine.evaluate(batch) * batch.num_tokens if batch.num_tokens else 0
    assert found["tokens"] == count == pytest.approx(0.15 * len(corpus.held_out), rel=0.02)
    assert found["loss"] == pytest.approx(total / count, rel=1e-12)
    assert run("evaluate", "--checkpoint", encoder, "--batches", 1) == 0
    assert " per masked token, " in capsys.readouterr().out
    line = words(f"generate --prompt x --checkpoint {encoder}")
    assert_refused(run(*line), "an encoder (causal = false), which fills in masked tokens", capsys)


def test_generate_slides_beyond_the_context_and_prints_text(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompted = words("generate --checkpoint {saved} --prompt 'The '", saved=saved)
    assert run(*prompted, *words("--tokens 30 --greedy --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(saved)
    engine = OracleEngine(CONFIG)
    engine.reset(weights())
    text = list(b"The ")
    for _ in range(30):
        text.append(int(engine.predict(np.array([text[-24:]]))[0, -1].argmax()))
    assert found["tokens"] == [text[4:]] and len(text) > 24 and len(set(text[4:])) > 5
    assert found["texts"][0].startswith("The ") and found["closest_call"] > 1e-9
    assert run(*prompted, "--tokens", 3, "--samples", 3) == 0
    text = capsys.readouterr().out
    for line in ("--- sample 2", "temperature 1, seed 0; closest call", "2 micro-batches"):
        assert line in text


def test_generate_searches_by_beams_and_ends_at_the_end_of_sequence(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompted = words("generate --checkpoint {saved} --prompt 'The ' --tokens 12", saved=saved)
    search = [*prompted, *words("--num-beams 4 --samples 2 --length-penalty 0.5")]
    assert run(*search, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    engine = OracleEngine(CONFIG)
    engine.reset(weights())
    for tokens, score in zip(found["tokens"], found["scores"], strict=True):
        logits = engine.predict(np.array([[*b"The ", *tokens]]))[0, 3:-1]
        chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = chances[np.arange(12), tokens].sum()
        assert score == pytest.approx(total / 12**0.5, rel=1e-9)
    assert found["scores"] == sorted(found["scores"], reverse=True)
    first = found["tokens"][0]
    ends = ["--eos", first[5], "--early-stopping"]
    assert run(*search, *ends, "--json") == 0
    ended = json.loads(capsys.readouterr().out)["tokens"]
    assert all(len(tokens) == 12 or tokens[-1] == first[5] for tokens in ended)
    assert min(map(len, ended)) < 12
    assert run(*search) == 0
    assert "4 beams, score -" in (text := capsys.readouterr().out) and "--- sample 1, score" in text
    assert run(*prompted, "--greedy", "--json") == 0
    greedy = json.loads(capsys.readouterr().out)
    assert greedy["scores"] is None
    eos = greedy["tokens"][0][4]
    assert run(*prompted, "--greedy", "--eos", eos, "--json") == 0
    shorter = json.loads(capsys.readouterr().out)["tokens"][0]
    assert shorter == greedy["tokens"][0][: greedy["tokens"][0].index(eos) + 1]


def test_a_schedule_from_a_file_says_how_many_micro_batches_the_samples_make(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.txt").write_text("0: F0 F1 F2 F3 BW0 BW1 BW2 BW3\n")
    line = "generate --checkpoint {} --prompt 'The ' --tokens 1 --stages 1 --samples 2 --schedule"
    assert run(*words(line.format(saved)), f"file:{tmp_path / 'table.txt'}") == 0
    assert "1f1b" not in (text := capsys.readouterr().out) and "4 micro-batches" in text


def test_fewer_mini_batches_than_asked_for_are_said(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", "--checkpoint", saved, "--batches", 10**6) == 0
    assert "mini-batches, all there are; " in capsys.readouterr().out


def test_wrong_input_is_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = f"generate --checkpoint {saved} --prompt x "
    beams = f"{ours} --num-beams 3 "
    wrong = {
        f"{ours} --top-p 0": "--top-p: '0'; expected a number, more than 0, at most 1",
        f"{ours} --top-p 1.5": "expected a number, more than 0, at most 1",
        f"{ours} --top-p nan": "expected a number, more than 0, at most 1",
        f"{ours} --eos 256": "--eos 256: the vocabulary has 256 tokens; expected 0 to 255",
        f"{ours} --eos=-1": "expected a whole number, at least 0",
        f"{ours} --num-beams 1": "expected a whole number, at least 2",
        f"{ours} --num-beams 256": "--num-beams 256: the vocabulary has 256 tokens; expected at "
        "most 255",
        f"{beams} --samples 4": "--samples 4: beam search has --num-beams 3; expected at most as "
        "many",
        f"{beams} --greedy": "--num-beams and --greedy: expected one of them",
        f"{beams} --temperature 2": "--temperature: --num-beams makes no random choice",
        f"{beams} --top-p 0.5": "--top-p: --num-beams makes no random choice",
        f"{beams} --seed 0": "--seed: --num-beams makes no random choice",
        f"{beams} --length-penalty 11": "expected a number from -10 to 10",
        f"{beams} --length-penalty inf": "expected a number from -10 to 10",
        f"{beams} --early-stopping maybe": "'maybe'; expected one of no, yes, never",
        f"{ours} --early-stopping": "--early-stopping: no beam search; expected --num-beams N",
        f"{ours} --length-penalty 0": "--length-penalty: no beam search; expected --num-beams N",
        f"{ours} --greedy --top-p 0.9": "--top-p: --greedy makes no random choice",
        "generate --prompt x --checkpoint /no/such": "expected a file of a checkpoint",
        f"generate --checkpoint {saved}": "expected one of --prompt TEXT and --prompt-tokens",
        f"generate --checkpoint {saved} --prompt-tokens 1,x": "expected numbers, such as 1,2,3",
        f"generate --checkpoint {saved} --prompt-tokens 256": "has 256 tokens; expected 0 to 255",
        f"generate --checkpoint {saved} --prompt x "
        "--temperature 0": "expected a number, more than 0",
        f"{ours} --temperature 1e-200": "expected a number, more than 0, at least 1e-100",
        f"generate --checkpoint {saved} --prompt x --tokenizer-file "
        f"{saved}/manifest.json": "expected a tokenizer.json",
        f"evaluate --checkpoint {saved} --batches 0": "expected a whole number, at least 1",
        f"evaluate --checkpoint {saved} --stages 9": "expected at most 4",
    }
    for line, message in wrong.items():
        assert_refused(run(*line.split()), message, capsys)
    assert run("generate", "--checkpoint", saved, "--prompt", "") == 2


def test_a_failed_worker_is_said_so(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = dict.fromkeys(FRAMEWORKS, Implementation("no_such_module", "numpy", ""))
    argv = ("generate", "--checkpoint", saved, "--prompt", "x")
    assert run(*argv, implementations=broken) == 1
    assert "failed: " in capsys.readouterr().out
