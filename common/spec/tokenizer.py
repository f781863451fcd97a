"""Text to tokens and back: bytes, byte pairs trained on the corpus, or any tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.io.bounded import read_text
from common.io.usage import UsageError
from common.spec.kept import NO_CACHE, find_kept, keep

MAX_TOKENIZER_BYTES = 2**28
BLOCK_CHARACTERS = 2**20
"""Longer texts are cut (`blocks_of`): the library takes some 100 bytes per token of a piece."""
PIECES_AT_ONCE_CHARACTERS = 8 * BLOCK_CHARACTERS
RECIPE = "lines, long words cut, byte level"
"""How `train_byte_pairs` trains: a new way needs a new name, since tokenizers are cached by it."""
LONGEST_WORD = 1000
"""Longer runs without white space, or of it, are cut before byte pairs are trained: the library's
time grows with the square of a word's length, and a genome or base64 is a single word."""
LONGEST_BLOCKS = 4
"""A text without line ends is cut elsewhere, after so many blocks at most."""
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""As GPT-2, Llama 3, Llama 2 and Gemma call the token after a document."""
UNKNOWN_TOKEN = "\N{REPLACEMENT CHARACTER}"
"""Shown for a token that the tokenizer lacks: the model's vocabulary may be padded."""


class TokenizerError(UsageError):
    """A tokenizer that cannot be read, or does not fit; its text is one line."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def content(self) -> bytes | None:
        """The tokenizer.json; None for bytes."""

    @property
    def vocab_size(self) -> int:
        """The largest token and 1, added and special tokens included."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens, without special tokens around the text. Raises TokenizerError."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text. An unknown token becomes U+FFFD; special tokens are shown."""

    def unknown(self, text: str) -> str:
        """Return the characters of the text that have no token of their own, each once."""


class ByteTokenizer:
    """Bytes as they are, of whatever encoding; text is UTF-8."""

    content = None
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # a command line may have any bytes

    def decode(self, tokens: Sequence[int]) -> str:
        pieces = [bytes([token]) if token < 256 else UNKNOWN_TOKEN.encode() for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def unknown(self, text: str) -> str:
        return ""


class FileTokenizer:
    """A tokenizer.json of the tokenizers library; `where` is for errors. Raises TokenizerError."""

    def __init__(self, content: bytes, where: str) -> None:
        from tokenizers import Tokenizer as Library

        self.content, self.where = content, where
        with self._one_line(f"; {EXPECTED}"):
            text = content.decode("utf-8")
            found = json.loads(text)
            if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
                raise TokenizerError(_no_tokenizer(where, found))
            self._library: Any = Library.from_str(text)
        # What is meant for other uses of the file, and would cut, fill or vary the text here.
        self._library.no_truncation()
        self._library.no_padding()
        if found["model"].get("dropout"):
            self._library.model.dropout = None
        self._known = frozenset(self._library.get_vocab(with_added_tokens=True).values())
        if not self._known:
            raise TokenizerError(f"{where}: its vocabulary is empty; expected a trained tokenizer")
        name, number = found["model"].get("unk_token"), found["model"].get("unk_id")
        self._unknown_token = number if name is None else self._library.token_to_id(name)

    @property
    def vocab_size(self) -> int:
        return max(self._known) + 1

    def encode(self, text: str) -> list[int]:
        return list(self._encoded([text])[0].ids)

    @property
    def dtype(self) -> type[np.uint16 | np.uint32]:
        """The smallest that holds every token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def end_of_text(self) -> str | None:
        """The special token that stands after a document; None if it has none of the usual."""
        added = self._library.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        return next((name for name in ENDS_OF_TEXT if name in special), None)

    def encode_all(self, pieces: Iterator[str]) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        """Yield all pieces' tokens, in order, by the library's threads. Raises TokenizerError."""
        dtype = self.dtype
        for group in _groups(pieces):
            ids = (encoding.ids for encoding in self._encoded(group))
            yield np.fromiter(itertools.chain.from_iterable(ids), dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        runs = itertools.groupby(tokens, self._known.__contains__)
        return "".join(
            str(self._library.decode(list(run), skip_special_tokens=False))
            if known
            else UNKNOWN_TOKEN * len(list(run))
            for known, run in runs
        )

    def unknown(self, text: str) -> str:
        with self._one_line():
            encoding = self._library.encode(text, add_special_tokens=False)
        # The places under some token that is not the unknown one.
        covered = {
            place
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token != self._unknown_token
            for place in range(start, end)
        }
        lost = (
            letter
            for place, letter in enumerate(text)
            if place not in covered and not letter.isspace()
        )
        return "".join(dict.fromkeys(lost))

    def _encoded(self, texts: list[str]) -> list[Any]:
        with self._one_line():
            return list(self._library.encode_batch_fast(texts, add_special_tokens=False))

    @contextlib.contextmanager
    def _one_line(self, hint: str = "") -> Iterator[None]:
        try:
            yield
        except TokenizerError:
            raise
        except (
            BaseException
        ) as error:  # the library raises plain Exceptions, and Rust's panics are none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200]
            raise TokenizerError(f"{self.where}: {reason}{hint}") from None


EXPECTED = "expected a tokenizer.json as the tokenizers library writes it"
BYTES = ByteTokenizer()


def _no_tokenizer(where: str, found: Any) -> str:
    """Return what a JSON file is instead, if that is known."""
    if isinstance(found, dict) and found and all(type(value) is int for value in found.values()):
        return f"{where}: a vocabulary without its merges; {FROM_PAIR}"
    return f"{where}: JSON without a model; {EXPECTED}"


FROM_PAIR = (
    "expected a tokenizer.json, which a pair of files becomes with `from tokenizers import "
    "ByteLevelBPETokenizer as T; "
    'T("vocab.json", "merges.txt").save("tokenizer.json")`'
)


def read_tokenizer(path: Path) -> FileTokenizer:
    """Read the tokenizer in a file. Raises TokenizerError."""
    return FileTokenizer(read_content(path), f"tokenizer {path}")


def read_content(path: Path) -> bytes:
    """Read a file that looks like JSON. Raises TokenizerError."""
    where = f"tokenizer {path}"
    try:
        if path.is_dir():
            raise TokenizerError(
                f"{where}: a folder; expected a tokenizer.json, such as {path / 'tokenizer.json'}"
            )
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise TokenizerError(f"{where}: not a plain file; {EXPECTED}")
        text = read_text(path, MAX_TOKENIZER_BYTES)
    except TokenizerError:
        raise
    except OSError as error:
        raise TokenizerError(f"{where}: {error.strerror}; {EXPECTED}") from None
    except UnicodeDecodeError:
        raise TokenizerError(f"{where}: not UTF-8; {EXPECTED}") from None
    except ValueError as error:  # a NUL in the name
        raise TokenizerError(f"{where}: {error}; {EXPECTED}") from None
    if text.startswith("#version") or path.name == "merges.txt":
        raise TokenizerError(f"{where}: merges without their vocabulary; {FROM_PAIR}")
    return text.encode()


def train_byte_pairs(lines: Iterator[str], vocab_size: int, digest: str) -> FileTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) trained on a text's lines; deterministic.

    What was trained is kept in the user's cache folder, where there is one that can be written.
    """
    from tokenizers import ByteLevelBPETokenizer, __version__

    where = "tokenizer bpe"
    key = hashlib.sha256(f"{digest} {vocab_size} {__version__} {RECIPE}".encode()).hexdigest()
    kept = find_kept("tokenizers", key, ".json")
    if kept is not None:
        return FileTokenizer(kept.read_bytes(), where)
    library: Any = ByteLevelBPETokenizer()
    pieces = without_long_words(lines)
    library.train_from_iterator(pieces, vocab_size=vocab_size, show_progress=False)
    content = str(library.to_str(pretty=True)).encode()
    with contextlib.suppress(*NO_CACHE):
        keep("tokenizers", key, ".json", lambda file: file.write(content))
    return FileTokenizer(content, where)


def without_long_words(lines: Iterable[str]) -> Iterator[str]:
    """Cut lines within runs longer than LONGEST_WORD of what is white space, or of what is not."""
    run = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
    for line in lines:
        start = 0
        # Most lines are too short for such a word, and need no search.
        for word in run.finditer(line) if len(line) > LONGEST_WORD else ():
            yield line[start : word.end()]
            start = word.end()
        yield line[start:]


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text into lines, as for training byte pairs, and before using them."""
    return (line for block in blocks for line in block.splitlines(keepends=True))


def blocks_of(text: Iterable[str], end_of_document: str | None = None) -> Iterator[str]:
    """Cut a text, which comes in any pieces, for a tokenizer of others: up to a mebibyte not at
    all, so that its tokens are the library's.

    A cut is after the end of a line that no white space follows, where every usual tokenizer has
    one too, or after `end_of_document`, a token of its own; in a text without such places before a
    space, or else anywhere.
    """
    end = re.compile(r"\n(?=\S)" + (f"|{re.escape(end_of_document)}" if end_of_document else ""))
    pieces: list[str] = []
    size, wanted = 0, BLOCK_CHARACTERS
    for piece in itertools.chain(text, [None]):
        pieces.append(piece or "")
        size += len(pieces[-1])
        if size > wanted or piece is None:
            whole, start = "".join(pieces), 0
            while cut := _cut(whole, start, end):
                yield whole[start:cut]
                start = cut
            pieces, size = [whole[start:]], len(whole) - start
            wanted = size + BLOCK_CHARACTERS  # not at every piece: that would take for ever
    if size:
        yield pieces[0]


def _cut(text: str, start: int, end: re.Pattern[str]) -> int | None:
    """Return where the block from `start` ends; None if more of the text is needed to say it."""
    least, most = start + BLOCK_CHARACTERS, start + LONGEST_BLOCKS * BLOCK_CHARACTERS
    # A place may begin ahead of the least length, as "</s>" does, where it ends behind it.
    for found in end.finditer(text, least - max(map(len, ENDS_OF_TEXT)), most + 1):
        if least <= found.end() <= most:
            return found.end()
    if len(text) <= most:
        return None
    space = text.rfind(" ", least, most)
    return most if space < 0 else space


def _groups(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Pieces together, so that the library uses all cores without holding everything at once."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= PIECES_AT_ONCE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
