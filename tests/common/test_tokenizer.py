"""Tokenizers: bytes, byte pairs, and the tokenizers library's files of every kind; what is wrong
with one is one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from common.spec import kept as kept_files
from common.spec import tokenizer as module
from common.spec.corpus_files import CorpusError
from common.spec.data import load_corpus
from common.spec.run import RunConfig, TransformerSpec
from common.spec.tokenizer import (
    BYTES,
    FileTokenizer,
    TokenizerError,
    read_tokenizer,
    train_byte_pairs,
    without_long_words,
)

TEXT = "The class statement\n\n    defines  a class.\n  \nSchrödinger's  \n\tcat\n" * 40


def gpt2() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **special)
    made.train_from_iterator([TEXT], trainer)
    return made


def word_piece() -> Any:
    """As BERT has it: in lower case, with tokens around a text, cut and filled to a length."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXT.replace("ö", "")], trainer)
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=9)
    return made


def unigram() -> Any:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def save(made: Any, path: Path) -> FileTokenizer:
    made.save(str(path))
    return read_tokenizer(path)


@pytest.mark.parametrize("make", [gpt2, word_piece, unigram])
def test_a_texts_tokens_are_the_librarys(make: Any, tmp_path: Path) -> None:
    made = make()
    ours = save(made, tmp_path / "tokenizer.json")
    made.no_truncation()
    made.no_padding()
    expected = made.encode(TEXT, add_special_tokens=False).ids
    assert ours.encode(TEXT) == expected and len(expected) > 300
    path = tmp_path / "text"
    path.write_text(TEXT)
    model = TransformerSpec(vocab_size=made.get_vocab_size(), context_length=8)
    file = str(tmp_path / "tokenizer.json")
    config = RunConfig(tokenizer="file", tokenizer_file=file, corpus=(str(path),), model=model)
    corpus = load_corpus(config)
    assert corpus.tokens.tolist() == expected
    assert corpus.tokenizer == (tmp_path / "tokenizer.json").read_bytes()
    assert ours.decode(expected) == made.decode(expected, skip_special_tokens=False)


def test_a_long_text_is_cut_where_its_tokens_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = save(gpt2(), tmp_path / "tokenizer.json")
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100)
    monkeypatch.setattr(module, "PIECES_AT_ONCE_CHARACTERS", 300)
    for text in (TEXT, TEXT.replace("\n", " "), "<|endoftext|>".join(TEXT.splitlines())):
        end = "<|endoftext|>" if "<|" in text else None
        pieces = list(module.blocks_of([text], end))
        assert len(pieces) > 5 and "".join(pieces) == text
        assert max(map(len, pieces)) <= 400
        # Where the text is cut does not depend on the pieces in which it comes.
        for size in (1, 7, 350):
            come = [text[i : i + size] for i in range(0, len(text), size)]
            assert list(module.blocks_of(come, end)) == pieces
        found = np.concatenate(list(ours.encode_all(iter(pieces))))
        np.testing.assert_array_equal(found, ours.encode(text))
    assert "".join(module.blocks_of(["x" * 999])) == "x" * 999
    assert list(module.lines_of(module.blocks_of([TEXT]))) == TEXT.splitlines(keepends=True)


def test_tokens_that_nobody_has_are_shown_and_characters_without_a_token_named(
    tmp_path: Path,
) -> None:
    ours = save(word_piece(), tmp_path / "a.json")
    assert ours.unknown("the κλάσ class") == "κλάσ"
    assert "[UNK]" in ours.decode(ours.encode("the κλάσ class"))
    tokens = ours.encode("the class")
    beyond = ours.vocab_size + 5
    assert ours.decode([*tokens, beyond, *tokens]) == "the class\N{REPLACEMENT CHARACTER}the class"
    assert BYTES.decode([72, 105, 300, 33]) == "Hi\N{REPLACEMENT CHARACTER}!"
    # What a command line has of bytes that are no text.
    assert BYTES.encode("caf\udce9") == list(b"caf\xe9")
    # Without a token for the unknown, it drops what it lacks.
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert save(letters, tmp_path / "b.json").unknown("abc") == "c"


def test_what_varies_is_switched_off(tmp_path: Path) -> None:
    made = gpt2()
    made.model.dropout = 0.5
    ours = save(made, tmp_path / "tokenizer.json")
    assert all(ours.encode(TEXT) == ours.encode(TEXT) for _ in range(3))
    assert ours.encode(TEXT) == save(gpt2(), tmp_path / "other.json").encode(TEXT)


def test_added_tokens_count(tmp_path: Path) -> None:
    made = gpt2()
    size = made.get_vocab_size()
    made.add_tokens([AddedToken("<extra>", special=True)])
    save(made, path := tmp_path / "tokenizer.json")
    config = {"tokenizer": "file", "tokenizer_file": str(path), "model": {"vocab_size": size}}
    message = rf"has {size + 1} tokens, added .* vocab_size = {size}, expected at least"
    with pytest.raises(TokenizerError, match=message):
        load_corpus(RunConfig.model_validate(config))
    roomy = RunConfig.model_validate(config | {"model": {"vocab_size": size + 7}})
    assert load_corpus(roomy).tokens.max() < size


def test_what_is_no_tokenizer_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    vocabulary = json.dumps(json.loads(gpt2().to_str())["model"]["vocab"]).encode()
    expected = "; expected a tokenizer.json"
    merges = (b"#version: 0.2\na b\n", f"merges without their vocabulary{expected}")
    wrong: dict[str, tuple[bytes, str]] = {
        "vocab.json": (vocabulary, 'T("vocab.json", "merges.txt").save("tokenizer.json")'),
        "merges.txt": merges,
        "tokenizer_config.json": (b'{"do_lower_case": true}', f"JSON without a model{expected}"),
        "spiece.model": (b"\n\x0e\xff\x00", f"not UTF-8{expected}"),
        "list.json": (b"[]", "JSON without a model"),
        "text": (b"text", "expected a tokenizer.json"),
        "kind.json": (b'{"model": {"type": "Best"}}', "expected a tokenizer.json"),
        "deep.json": (b"[" * 100_000, "expected a tokenizer.json"),
        "empty.json": (Tokenizer(models.BPE()).to_str().encode(), "its vocabulary is empty"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError) as error:
            read_tokenizer(tmp_path / name)
        text = str(error.value)
        assert message in text and str(tmp_path / name) in text, (name, text)
        assert "\n" not in text and len(text) < 500
    for path, message in {
        tmp_path: "a folder; expected",
        Path("/dev/zero"): "not a plain file",
        tmp_path / "none": "No such file",
        Path("a\0b"): "null",
        Path("x" * 5000): "too long",
    }.items():
        with pytest.raises(TokenizerError, match=message):
            read_tokenizer(path)


# --------------------------------------------------------------------------------------- byte pairs


KEPT_IN = kept_files.kept_in


def lines() -> Iterator[str]:
    return iter(TEXT.splitlines(keepends=True))


def test_byte_pairs_are_kept_and_a_damaged_copy_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_files, "kept_in", tmp_path.joinpath)
    first = train_byte_pairs(lines(), 280, "digest")
    (kept,) = tmp_path.glob("tokenizers/*.json")
    assert kept.read_bytes() == first.content
    assert train_byte_pairs(lines(), 290, "digest").vocab_size == 290
    assert train_byte_pairs(iter(["another text"]), 280, "other digest").content != first.content
    unread = lines()
    assert train_byte_pairs(unread, 280, "digest").content == first.content
    assert next(unread) == next(lines())
    kept.write_bytes(first.content.replace(b'"!"', b'"?"'))
    assert train_byte_pairs(lines(), 280, "digest").content == first.content


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", ""])
def test_byte_pairs_do_without_a_home(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept_files, "kept_in", KEPT_IN)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(Path, "home", no_home)
    assert train_byte_pairs(lines(), 280, "digest").vocab_size == 280


# ---------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            TEXT.encode() + "café\n".encode("latin-1"),
            r"not UTF-8 text at byte 2\d+ \(line 241\), 0xe9; expected UTF-8, or",
        ),
        (b"\xef\xbb\xbfa\nb\xff" + TEXT.encode(), r"not UTF-8 text at byte 6 \(line 2\), 0xff"),
        (TEXT.encode("utf-16"), "UTF-16 by its byte order mark; expected UTF-8"),
        (TEXT.encode("utf-32"), "UTF-32 by its byte order mark"),
        ("\n".join(TEXT).encode("utf-16-le"), r"not UTF-8 text at byte 1 \(line 1\), 0x00"),
        (TEXT.encode()[:-1] + "ö".encode()[:1], r"line 240\), 0xc3"),
    ],
    ids=["latin-1", "marked", "utf-16", "utf-32", "utf-16 without a mark", "cut"],
)
def test_what_is_not_utf8_is_refused_with_its_place(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path, good = tmp_path / "text", tmp_path / "good"
    path.write_bytes(content)
    good.write_text(TEXT)
    model = TransformerSpec(vocab_size=300)
    config = RunConfig(tokenizer="bpe", model=model, corpus=(str(good), str(path)))
    with pytest.raises(CorpusError, match=f"{path}: .*{message}") as error:
        load_corpus(config)
    assert "\n" not in str(error.value)
    as_bytes = load_corpus(RunConfig(corpus=(str(path),), model=TransformerSpec(context_length=4)))
    assert as_bytes.tokens.tobytes() == content


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    plain.write_text(TEXT)
    marked.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    config = {"tokenizer": "bpe", "model": {"vocab_size": 300, "context_length": 8}}
    configs = [config | {"corpus": [str(path)]} for path in (plain, marked)]
    a, b = (load_corpus(RunConfig.model_validate(each)) for each in configs)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_byte_pairs_are_trained_on_no_long_word() -> None:
    ordinary = ["a line of many words " * 200 + "\n", "\n", "x" * 1000]
    assert [piece for piece in without_long_words(ordinary) if piece] == ordinary
    for line in ("acgt" * 5000, " " * 5000, "word " + "x" * 2500 + " " * 1001 + "end\n"):
        pieces = list(without_long_words([line]))
        assert "".join(pieces) == line
        assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) == 1000
