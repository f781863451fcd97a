"""What `--corpus` names: files, folders, patterns, .jsonl and .gz; and a long text's tokens, which
are kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common.cli import main
from common.runtime.text import drop_tokens, open_text, write_text
from common.spec import corpus_files, data, kept, text
from common.spec import tokenizer as tokenizers
from common.spec.corpus_files import CorpusError, find_files
from common.spec.data import Corpus, load_corpus
from common.spec.run import RunConfig
from common.spec.text import read_texts
from tests.program import assert_refused

STORIES = ["Once upon a time\nthere was  a cat.", "  The end.\n\n", "", "Ein Schrödinger!"]


def config(*names: str, **run: Any) -> RunConfig:
    model = {"context_length": 2, "vocab_size": 300 if run else 256}
    return RunConfig.model_validate({"corpus": names, "model": model, **run})


def jsonl(records: list[str]) -> str:
    return "".join(json.dumps({"id": 1, "text": each}) + "\n" for each in records)


def content(*names: str) -> bytes:
    found = read_texts(names)
    whole = b"".join(found.data(lambda more_bytes: None))
    assert found.num_bytes == len(whole)
    if not any("jsonl" in name for name in names):
        assert found.digest == hashlib.sha256(whole).hexdigest()
    assert "".join(found.decoded(lambda more_bytes: None)) == whole.decode()
    return whole


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------- files


def test_a_folder_and_a_pattern_are_their_files_sorted_by_path() -> None:
    names = ["d/a.txt", "d/b/c.txt", "d/b/.hidden", "d/.git/HEAD", "d/Z.md", "d/é.txt", "e[1].txt"]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"This is {name}.")
    Path("e1.txt").write_text("Not this.")
    Path("d/link.txt").symlink_to("a.txt")
    paths = ["d/Z.md", "d/a.txt", "d/b/c.txt", "d/link.txt", "d/é.txt"]
    assert [each.path for each in find_files(["d"])] == paths
    assert content("d") == content(*paths) == b"\n".join(Path(each).read_bytes() for each in paths)
    assert [each.path for each in find_files(["d/*"])] == [p for p in paths if p != "d/b/c.txt"]
    assert [each.path for each in find_files(["d/**/*.txt"])] == paths[1:]
    assert content("e[1].txt") == b"This is e[1].txt."  # what exists is no pattern
    both = [each.path for each in find_files(["d/b", "e[1].txt", "d/b"])]
    assert both == ["d/b/c.txt", "e[1].txt", "d/b/c.txt"]


def test_a_compressed_file_is_its_text() -> None:
    plain = b"Some text of a corpus.\n" * 200_000  # longer than a piece
    Path("a.txt").write_bytes(plain)
    Path("A.TXT.GZ").write_bytes(gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]))
    Path("b.jsonl").write_text(jsonl(STORIES))
    Path("b.jsonl.gz").write_bytes(gzip.compress(Path("b.jsonl").read_bytes()))
    assert content("A.TXT.GZ") == content("a.txt") == plain
    assert content("b.jsonl.gz", "A.TXT.GZ") == content("b.jsonl", "a.txt")


def test_documents_stand_apart_and_files_are_joined() -> None:
    Path("a").write_text("one\ntwo")
    Path("b").write_text("three")
    marked = "\ufeff" + jsonl(STORIES[:2]) + "\n \r\n" + jsonl(STORIES[2:]).replace("\n", "\r\n")
    Path("c.jsonl").write_text(marked.removesuffix("\r\n"), newline="")
    stories = "\n\n".join(STORIES)
    assert content("a", "b", "c.jsonl", "a").decode() == f"one\ntwo\nthree\n\n{stories}\n\none\ntwo"
    Path("one.jsonl").write_text(jsonl(["the\u2028same é"]))
    Path("one.txt").write_text("the\u2028same é")
    assert read_texts(["one.jsonl"]) == read_texts(["one.txt"])
    # In a file a blank line is no end of a document: these are two texts, of other tokens.
    Path("all.txt").write_text(stories)
    assert content("all.txt") == content("c.jsonl") and read_texts(["all.txt"]) != read_texts(
        ["c.jsonl"]
    )


@pytest.mark.parametrize("end", tokenizers.ENDS_OF_TEXT)
def test_documents_end_with_the_tokenizers_own_token(end: str) -> None:
    Path("c.jsonl").write_text(jsonl(STORIES))
    Path("a").write_text("one\ntwo")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<pad>", end], "initial_alphabet": alphabet}
    made.train_from_iterator(STORIES, trainers.BpeTrainer(show_progress=False, **special))
    made.save("tokenizer.json")
    model = {"context_length": 2, "vocab_size": 400}
    run = {"tokenizer": "file", "tokenizer_file": "tokenizer.json", "model": model}
    found = load_corpus(RunConfig.model_validate({"corpus": ["c.jsonl", "a", "a"], **run}))
    expected: list[int] = []
    for story in STORIES:
        expected += [*made.encode(story).ids, 1]
    assert found.tokens.tolist() == expected + made.encode("one\ntwo\none\ntwo").ids


LINE = 'expected an object a line, such as {"text": "Once upon a time"}'


# Without the time in gzip's header: every process that runs tests must name them alike.
@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"tex": "b"}', f"line 3: has tex, but no text; {LINE}"),
        ("a.jsonl", b"{}", f"line 1: has no field, but no text; {LINE}"),
        ("a.jsonl", b'{"text": null}', f"line 1: its text is no string; {LINE}"),
        ("a.jsonl", b'["text"]', f"line 1: not an object; {LINE}"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', "line 2: not JSON: Expecting"),
        ("a.jsonl", b"The text", "line 1: not JSON: Expecting value, at column 1"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON: nested too deep"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "line 1: not UTF-8 at its byte 13, 0xe9"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8 at its byte 0, 0xff"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: half of a character in its text"),
        ("a.jsonl", b'{"text": "' + b"x" * 200 + b'"}', "line 1 is longer than 128 bytes"),
        ("a.gz", b"plain", "Not a gzipped file (b'pl'); expected a whole gzip file"),
        ("a.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "ended before the end-of-stream"),
        ("a.gz", gzip.compress(b"text" * 99, mtime=0)[:-8] + bytes(8), "CRC check failed"),
        ("a.gz", gzip.compress(b"text", mtime=0)[:12] + b"\xff" * 20, "expected a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0), "line 1: has a, but no text"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(
    name: str, what: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "longer" in message:
        monkeypatch.setattr(corpus_files, "MAX_RECORD_BYTES", 128)
    Path(name).write_bytes(what)
    with pytest.raises(CorpusError) as error:
        read_texts([name])
    assert str(error.value).startswith(f"corpus {name}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and "; expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "corpus empty: a folder without files, hidden ones aside; expected a text file"),
        ("*.jsonl", "corpus *.jsonl: no file matches; expected a text file, a folder of them"),
        ("none.txt", "corpus none.txt: No such file or directory; expected a readable text file"),
        ("a/dangling", "corpus a/dangling: No such file or directory"),
        ("a", "corpus a/dangling: No such file or directory"),
        ("pipes", "corpus pipes/pipe: not a plain file"),
        ("a[b", "corpus a[b: no file matches"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_names_without_files_are_refused_before_anything_runs(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty/.hidden").mkdir(parents=True)
    for folder in ("a", "pipes"):
        Path(folder).mkdir()
    Path("a/dangling").symlink_to("nowhere")
    os.mkfifo("pipes/pipe")
    assert_refused(main.main(["train", "--corpus", name]), message, capsys)


# ------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make every text a long one, which is cut after some 1000 characters."""
    monkeypatch.setattr(data, "LONG_BYTES", 1)
    monkeypatch.setattr(tokenizers, "BLOCK_CHARACTERS", 1000)
    monkeypatch.setattr(kept, "kept_in", (tmp_path / "kept").joinpath)
    Path("a.txt").write_text("The cat sat.\n" * 2000)
    return tmp_path / "kept" / "tokens"


def loaded(**run: Any) -> Corpus:
    data._tokenized.cache_clear()
    return load_corpus(config("a.txt", **run))


@pytest.mark.parametrize("run", [{}, {"tokenizer": "bpe"}])
def test_a_long_texts_tokens_are_made_once_and_mapped(
    run: dict[str, Any], long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data, "LONG_BYTES", 10**9)
        short = loaded(**run)
    made = loaded(**run)
    assert isinstance(made.tokens, np.memmap) and not isinstance(short.tokens, np.memmap)
    np.testing.assert_array_equal(made.tokens, short.tokens)
    assert made.tokens.dtype == short.tokens.dtype
    batches = [each.training_batch(config("a.txt", **run), 3) for each in (made, short)]
    np.testing.assert_array_equal(batches[0].inputs, batches[1].inputs)
    (file,) = long.glob("*.npy")
    with monkeypatch.context() as patch:
        again = lambda *given: pytest.fail("tokenized again")  # noqa: E731
        patch.setattr(tokenizers.FileTokenizer, "encode_all", again)
        patch.setattr(text.Text, "data", lambda *given: pytest.fail("read again"))
        np.testing.assert_array_equal(loaded(**run).tokens, short.tokens)
    # Damaged, or cut off: made anew. And a text that only differs in its files' names is known.
    for damage in (b"x", file.read_bytes()[:-1], file.read_bytes()[:-1] + b"\0"):
        file.write_bytes(damage)
        np.testing.assert_array_equal(loaded(**run).tokens, short.tokens)
    # A worker process gets a link to them, which goes without them.
    job = write_text(made, Path("run"))
    assert Path(job.tokens).is_symlink() and job == write_text(made, Path("run"))
    np.testing.assert_array_equal(open_text(job).tokens, short.tokens)
    drop_tokens(job)
    assert list(long.glob("*.npy")) == [file] and not os.path.lexists(job.tokens)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_tokens_that_are_not_whole_are_never_taken(
    error: BaseException, long: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected = loaded().tokens.tolist()
    (file,) = long.glob("*.npy")
    file.unlink()

    def fail(descriptor: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        if isinstance(error, OSError):  # the run goes on
            assert loaded().tokens.tolist() == expected
            said = "note: the tokens of the corpus are not kept: No space left on device"
            assert said in capsys.readouterr().err
        else:
            with pytest.raises(KeyboardInterrupt):
                loaded()
    assert [each.suffix for each in long.iterdir()] == [".lock"]
    (long / next(long.iterdir()).name.replace(".lock", ".partial")).write_bytes(b"of a killed run")
    assert loaded().tokens.tolist() == expected
    assert sorted(each.suffix for each in long.iterdir()) == [".lock", ".npy"]


def test_a_cache_that_cannot_be_written_is_one_line(
    long: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept, "kept_in", Path("/proc/none").joinpath)
    assert loaded().tokens.tobytes() == Path("a.txt").read_bytes()
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert "note: the tokens of the corpus are not kept: No such file" in captured.err


def test_two_runs_at_once_make_them_once(tmp_path: Path) -> None:
    made: list[int] = []

    def write(file: Any) -> None:
        made.append(1)
        file.write(b"tokens")
        waiting.wait(timeout=0.2)  # meanwhile the other is at the lock

    waiting, found = threading.Event(), []

    def run() -> None:
        found.append(kept.keep("tokens", "key", ".npy", write))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and len(set(found)) == 1 and found[0].read_bytes() == b"tokens"


def test_a_text_that_changes_while_it_is_read_is_refused(long: Path) -> None:
    found = read_texts(["a.txt"])
    Path("a.txt").write_text("Another text.")
    with pytest.raises(CorpusError, match=r"corpus a\.txt: changed while it was read"):
        list(found.data(lambda more_bytes: None))
    assert read_texts(["a.txt"]).digest == hashlib.sha256(b"Another text.").hexdigest()


def test_a_bar_is_for_a_terminal_alone(
    long: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "LONG_BYTES", 1)
    text._digested_once.cache_clear()
    loaded()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for each in long.glob("*.npy"):
        each.unlink()
    text._digested_once.cache_clear()
    loaded()
    captured = capsys.readouterr()
    assert "reading the corpus" in captured.err and "tokenizing the corpus" in captured.err
    assert not captured.out
