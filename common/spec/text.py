"""The text of a run: files, or the manual that every CPython carries, as they are and decoded."""

from __future__ import annotations

import codecs
import hashlib
import pydoc_data.topics
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.io.usage import UsageError

MARKS = {  # the longer ones first, since they begin as the others
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class CorpusError(UsageError):
    """A corpus that cannot be read or is too short."""


@dataclass(frozen=True)
class Text:
    """The files of a corpus, or CPython's manual, as bytes."""

    digest: str
    """SHA-256 of all files, in order."""
    num_bytes: int = field(compare=False)
    files: tuple[tuple[str, bytes], ...] = field(compare=False)
    """By name, for errors."""

    @property
    def data(self) -> bytes:
        return b"\n".join(data for _, data in self.files)

    @property
    def decoded(self) -> str:
        """Raises CorpusError for what is not UTF-8."""
        return "\n".join(_decoded(name, data) for name, data in self.files)


def read_texts(paths: Sequence[str]) -> Text:
    """Read the files, in order. Raises CorpusError."""
    if paths:
        files = tuple((path, _read(path)) for path in paths)
    else:
        topics: dict[str, str] = pydoc_data.topics.topics
        files = (
            ("the manual of CPython", "\n".join(topics[name] for name in sorted(topics)).encode()),
        )
    data = b"\n".join(data for _, data in files)
    return Text(hashlib.sha256(data).hexdigest(), len(data), files)


def _read(path: str) -> bytes:
    reason = "not a plain file"
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):  # a device or a pipe may never end
            return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
    raise CorpusError(f"corpus {path}: {reason}; expected a readable text file")


def _decoded(name: str, data: bytes) -> str:
    """Decode the text without a byte order mark. Raises CorpusError at the first wrong byte."""
    utf8 = "expected UTF-8, or --tokenizer bytes, which takes bytes as they are"
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise CorpusError(f"corpus {name}: {encoding} by its byte order mark; {utf8}")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    text, wrong = "", data.find(b"\0")  # valid, but of no text: of UTF-16, say
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = start + error.start if wrong < 0 else min(wrong, start + error.start)
    if wrong >= 0:
        line = data.count(b"\n", 0, wrong) + 1
        raise CorpusError(
            f"corpus {name}: not UTF-8 text at byte {wrong} (line {line}), "
            f"0x{data[wrong]:02x}; {utf8}"
        )
    return text
