"""The text of a run, as bytes and decoded: the files of a corpus, or CPython's own manual."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import itertools
import operator
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from common.io.progress import byte_bar
from common.spec.corpus_files import CorpusError, CorpusFile, Document, find_files, read_documents

MARKS = {  # the longer ones first, since they begin as the others
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LONG_BYTES = 2**24
"""A text of so many bytes takes so long that its tokens are kept, and a bar is shown."""
BLANK_LINE = "\n\n"
Advance = Callable[[int], None]
"""It is told how many more bytes of the files are read."""


@dataclass(frozen=True)
class Text:
    """The files of a corpus, or CPython's manual. It is read anew whenever it is asked for."""

    digest: str
    """SHA-256 of all that `data` yields, and of where documents end."""
    num_bytes: int = field(compare=False)
    files: tuple[CorpusFile, ...] | None = field(compare=False)
    """None: the manual."""

    def bar(self, what: str) -> contextlib.AbstractContextManager[Advance]:
        """Show on a terminal how much of the files is read, if they are long."""
        return byte_bar(what, sum(file.num_bytes for file in self.files or ()), LONG_BYTES)

    def data(self, advance: Advance) -> Iterator[bytes]:
        """Yield all bytes, in pieces. Raises CorpusError."""
        return (chunk for _, chunk in self._checked(advance))

    def decoded(self, advance: Advance, end_of_document: str = BLANK_LINE) -> Iterator[str]:
        """Yield the text in pieces, `end_of_document` where a .jsonl's document begins or ends.

        Raises CorpusError for what is not UTF-8.
        """
        for document, pieces in itertools.groupby(self._checked(advance), operator.itemgetter(0)):
            chunks = (chunk for _, chunk in pieces)
            if document is None:
                for chunk in chunks:
                    yield end_of_document if chunk == BLANK_LINE.encode() else chunk.decode()
            elif document.is_record:
                yield from (chunk.decode() for chunk in chunks)
            else:
                yield from _decoded(document.name, chunks)

    def _checked(self, advance: Advance) -> Iterator[tuple[Document | None, bytes]]:
        digest = hashlib.sha256()
        for document, chunk in _pieces(self.files, advance):
            digest.update(_counted(document, chunk))
            yield document, chunk
        if digest.hexdigest() != self.digest:
            names = " ".join(file.path for file in self.files or ())
            raise CorpusError(f"corpus {names}: changed while it was read; expected a text at rest")


def read_texts(names: Sequence[str]) -> Text:
    """Find the files of a corpus, and read them once for their digest. Raises CorpusError."""
    return _digested_once(find_files(names)) if names else _digested(None)


@functools.lru_cache(maxsize=8)  # a subcommand asks more than once, and a gigabyte takes a while
def _digested_once(files: tuple[CorpusFile, ...]) -> Text:
    return _digested(files)


def _digested(files: tuple[CorpusFile, ...] | None) -> Text:
    digest, num_bytes = hashlib.sha256(), 0
    with Text("", 0, files).bar("reading the corpus") as advance:
        for document, chunk in _pieces(files, advance):
            digest.update(_counted(document, chunk))
            num_bytes += len(chunk)
    return Text(digest.hexdigest(), num_bytes, files)


def _pieces(
    files: tuple[CorpusFile, ...] | None, advance: Advance
) -> Iterator[tuple[Document | None, bytes]]:
    """Yield the documents in pieces, and under None what joins two of them.

    Between plain files stands one line end: they may be one text. A .jsonl's document is one.
    """
    if files is None:
        topics: dict[str, str] = pydoc_data.topics.topics
        manual = "\n".join(topics[name] for name in sorted(topics)).encode()
        yield Document("the manual of CPython", False), manual
        return
    before: Document | None = None
    for file in files:
        for document, chunk in read_documents(file, advance):
            if before is not None and document is not before:
                apart = document.is_record or before.is_record
                yield None, (BLANK_LINE if apart else "\n").encode()
            yield document, chunk
            before = document


def _counted(document: Document | None, chunk: bytes) -> bytes:
    """A blank line in a file, and between two documents, where a tokenizer may put a token of its
    own, make different texts: the latter counts with a byte that is not in UTF-8."""
    return b"\xff" + chunk if document is None and chunk == BLANK_LINE.encode() else chunk


def _decoded(name: str, chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode a file without its byte order mark. Raises CorpusError at the first wrong byte."""
    utf8 = "expected UTF-8, or --tokenizer bytes, which takes bytes as they are"
    place, line, held = 0, 1, b""  # `held` begins at byte `place`, in this line
    for chunk in itertools.chain(chunks, [None]):
        data = held + (chunk or b"")
        if place == 0:
            for mark, encoding in MARKS.items():
                if data.startswith(mark):
                    raise CorpusError(f"corpus {name}: {encoding} by its byte order mark; {utf8}")
            if data.startswith(codecs.BOM_UTF8):
                data, place = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        text, used = "", 0
        wrong = data.find(b"\0")  # valid, but of no text: of UTF-16, say
        try:
            # A character may begin in one chunk and end in the next.
            text, used = codecs.utf_8_decode(data, "strict", chunk is None)
        except UnicodeDecodeError as error:
            wrong = error.start if wrong < 0 else min(wrong, error.start)
        if wrong >= 0:
            line += data.count(b"\n", 0, wrong)
            raise CorpusError(
                f"corpus {name}: not UTF-8 text at byte {place + wrong} (line {line}), "
                f"0x{data[wrong]:02x}; {utf8}"
            )
        yield text
        place, line, held = place + used, line + data.count(b"\n", 0, used), data[used:]
