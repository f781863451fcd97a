"""Data: real text, batches that depend on seed and step only, a held-out end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.spec.data import (
    IGNORED,
    Batch,
    CorpusError,
    load_corpus,
    load_tokenizer,
    sequences_in,
)
from common.spec.run import RunConfig, TrainSpec, TransformerSpec


def test_the_default_corpus_is_real_text_with_a_digest() -> None:
    corpus = load_corpus(RunConfig())
    assert corpus.num_bytes > 300_000 and len(corpus.digest) == 64
    text = bytes(corpus.train[:20_000].astype(np.uint8)).decode(errors="replace")
    assert "statement" in text


def test_batches_depend_on_seed_and_step_only() -> None:
    corpus, again = load_corpus(RunConfig()), load_corpus(RunConfig(framework="paddle", stages=4))
    batch = corpus.batch(7, seed=3, batch_size=8, context_length=16)
    np.testing.assert_array_equal(batch.inputs, again.batch(7, 3, 8, 16).inputs)
    assert not np.array_equal(batch.inputs, corpus.batch(8, 3, 8, 16).inputs)
    assert not np.array_equal(batch.inputs, corpus.batch(7, 4, 8, 16).inputs)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize(
    ("count", "sizes"), [(4, [2, 2, 2, 2]), (3, [3, 3, 2]), (5, [2, 2, 2, 1, 1]), (8, [1] * 8)]
)
def test_micro_batches_are_the_mini_batch_in_order(count: int, sizes: list[int]) -> None:
    batch = load_corpus(RunConfig()).batch(0, 0, 8, 4)
    pieces = batch.micro_batches(count)
    assert [len(piece.inputs) for piece in pieces] == sizes
    np.testing.assert_array_equal(np.concatenate([piece.inputs for piece in pieces]), batch.inputs)
    np.testing.assert_array_equal(
        np.concatenate([piece.targets for piece in pieces]), batch.targets
    )
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in pieces]), np.arange(8))


@pytest.mark.parametrize("count", [0, 9])
def test_a_micro_batch_has_at_least_one_sequence(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"8 sequences cannot be cut into {count} micro-batches; expected 1 to 8"
    ):
        load_corpus(RunConfig()).batch(0, 0, 8, 4).micro_batches(count)


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    corpus = load_corpus(RunConfig(corpus=(str(path),)))
    assert set(corpus.train) == {ord("a")} and set(corpus.held_out) == {ord("b")}


def test_byte_pairs_are_trained_at_run_time_and_repeat() -> None:
    config = RunConfig(tokenizer="bpe", model=TransformerSpec(vocab_size=400))
    corpus = load_corpus(config)
    assert corpus.train.max() < 400 and len(corpus.train) < corpus.num_bytes / 1.5
    np.testing.assert_array_equal(corpus.train, load_corpus(config).train)


ENCODER = {"causal": False, "context_length": 12}


def test_masked_tokens_are_those_of_bert() -> None:
    """15 % are chosen, at least one; of these 80 % are masked, 10 % random, 10 % kept."""
    config = RunConfig(
        model=TransformerSpec.model_validate(ENCODER), train=TrainSpec(batch_size=500)
    )
    corpus = load_corpus(config)
    plain = corpus.batch(3, 0, 500, 12)
    batch = corpus.training_batch(config, 3)
    chosen = batch.targets != IGNORED
    np.testing.assert_array_equal(batch.targets[chosen], plain.inputs[chosen])
    np.testing.assert_array_equal(batch.inputs[~chosen], plain.inputs[~chosen])
    assert set(chosen.sum(1)) == {1, 2} and chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert np.abs(chosen.mean(0) - 0.15).max() < 0.07, "every place alike"
    seen, right = batch.inputs[chosen], batch.targets[chosen]
    masked, kept = (seen == 255).mean(), (seen == right).mean()
    assert masked == pytest.approx(0.8, abs=0.05) and kept == pytest.approx(0.1, abs=0.04)
    others = seen[(seen != 255) & (seen != right)]
    assert len(others) / len(seen) == pytest.approx(0.1, abs=0.04) and others.max() > 200


def test_what_is_masked_is_a_function_of_seed_step_and_sample() -> None:
    def batch(size: int, step: int = 0, seed: int = 0, **run: Any) -> Batch:
        train = TrainSpec(batch_size=size, micro_batches=1, seed=seed)
        model = TransformerSpec.model_validate(ENCODER)
        config = RunConfig(model=model, train=train, **run)
        return load_corpus(config).training_batch(config, step)

    eight = batch(8)
    for other in (batch(8), batch(12).first(8)):
        np.testing.assert_array_equal(other.targets[:8] != IGNORED, eight.targets != IGNORED)
        np.testing.assert_array_equal(other.inputs[:8] == 255, eight.inputs == 255)
    for other in (batch(8, step=1), batch(8, seed=1)):
        assert not np.array_equal(other.targets != IGNORED, eight.targets != IGNORED)
    short = batch(8, sequences_per_epoch=5)
    np.testing.assert_array_equal(short.targets[:5], eight.targets[:5])
    assert (short.targets[5:] == IGNORED).all()


def test_the_mask_is_the_tokenizers_own_or_a_token_that_no_text_has(tmp_path: Path) -> None:
    encoder = TransformerSpec(causal=False, vocab_size=400)
    pairs = RunConfig(tokenizer="bpe", model=encoder)
    corpus = load_corpus(pairs)
    assert corpus.tokens.max() == 398 and corpus.mask_token(encoder) == 399
    assert load_tokenizer(pairs).vocab_size == 399
    assert corpus.tokenizer is not None
    with_mask = json.loads(corpus.tokenizer)
    with_mask["added_tokens"] = [
        {"id": 399, "content": "[MASK]", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_mask))
    larger = encoder.model_copy(update={"vocab_size": 500})
    path = str(tmp_path / "tokenizer.json")
    own = RunConfig(tokenizer="file", tokenizer_file=path, model=larger)
    assert load_corpus(own).mask_token(larger) == 399
    (tmp_path / "latin-1").write_bytes(b"Stra\xdfe, \xff; " * 100)
    with pytest.raises(CorpusError, match="has token 255, the last one, which masks"):
        load_corpus(
            RunConfig(
                model=TransformerSpec(causal=False, context_length=8),
                corpus=(str(tmp_path / "latin-1"),),
            )
        )


def test_corpus_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"missing\.txt: No such file"):
        load_corpus(RunConfig(corpus=(str(tmp_path / "missing.txt"),)))
    (tmp_path / "short").write_text("short")
    with pytest.raises(CorpusError, match="has 5 tokens; expected at least"):
        load_corpus(RunConfig(corpus=(str(tmp_path / "short"),)))


def test_sequences_end_early_and_epochs_end_with_what_is_left() -> None:
    train = {"batch_size": 8, "micro_batches": 2}
    config = RunConfig.model_validate(
        {"train": train, "sequence_lengths": "random", "sequences_per_epoch": 19}
    )
    corpus = load_corpus(config)
    batches = [corpus.training_batch(config, step) for step in range(6)]
    assert [sequences_in(step, 8, 19) for step in range(6)] == [8, 8, 3, 8, 8, 3]
    assert [int((batch.targets[:, 0] != IGNORED).sum()) for batch in batches] == [8, 8, 3, 8, 8, 3]
    lengths = (batches[0].targets != IGNORED).sum(1)
    assert len(set(lengths)) > 1 and batches[0].num_tokens == lengths.sum()
    full = corpus.training_batch(
        config.model_copy(update={"sequence_lengths": "full", "sequences_per_epoch": None}), 0
    )
    np.testing.assert_array_equal(
        batches[0].targets[0, : lengths[0]], full.targets[0, : lengths[0]]
    )
