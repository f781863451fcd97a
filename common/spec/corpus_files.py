"""What `--corpus` names: files, folders and patterns; plain text, `.jsonl`, and both in `.gz`.

Files are read in pieces, so that a text may be larger than the memory.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from common.io.edges import printable
from common.io.usage import UsageError

CHUNK_BYTES = 2**20
MAX_RECORD_BYTES = 2**26
"""The longest line of a .jsonl: one without an end must not fill the memory."""


class CorpusError(UsageError):
    """A corpus that cannot be read or is too short."""


class CorpusFile(NamedTuple):
    """A file as it was found; another time or size is another content."""

    path: str
    num_bytes: int
    """On the disk: compressed ones are longer."""
    identity: tuple[int, ...]
    """Its place on the disk and the time of its last change."""


@dataclass(frozen=True, eq=False)
class Document:
    """A piece of the corpus with a beginning and an end; no two are equal."""

    name: str
    """The file, for errors."""
    is_record: bool
    """Whether it is a line of a .jsonl, which is Unicode; a plain file may have any bytes."""


# ------------------------------------------------------------------------------------------- names


def find_files(names: Sequence[str]) -> tuple[CorpusFile, ...]:
    """Return the files that are named, in order; those of a folder or a pattern sorted by path.

    A folder stands for all files in it, at any depth, but hidden ones. What exists is no pattern,
    whatever its name. Raises CorpusError.
    """
    return tuple(_look_at(path) for name in names for path in _expand(name))


def _expand(name: str) -> list[str]:
    if os.path.isdir(name):  # noqa: PTH112  false, not an error, for whatever is no name
        found, what = _files_in(name), "a folder without files, hidden ones aside"
    elif glob.has_magic(name) and not os.path.lexists(name) and "\0" not in name:
        matches = glob.iglob(name, recursive=True)  # noqa: PTH207  absolute or not
        found, what = [each for each in matches if not Path(each).is_dir()], "no file matches"
    else:
        return [name]
    if not found:
        expected = "expected a text file, a folder of them, or a pattern such as 'texts/*.txt'"
        raise CorpusError(f"corpus {name}: {what}; {expected}")
    return sorted(found)


def _files_in(folder: str) -> list[str]:
    def refuse(error: OSError) -> NoReturn:
        why = f"{error.strerror}; expected a folder that can be read"
        raise CorpusError(f"corpus {error.filename}: {why}") from None

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [str(Path(parent, each)) for each in files if not each.startswith(".")]
    return found


def _look_at(path: str) -> CorpusFile:
    reason = "not a plain file"
    try:
        found = Path(path).stat()
        if stat.S_ISREG(found.st_mode):  # a device or a pipe may never end
            with Path(path).open("rb"):  # and it may be read
                identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
                return CorpusFile(path, found.st_size, identity)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
    raise CorpusError(f"corpus {path}: {reason}; expected a readable text file")


# ----------------------------------------------------------------------------------------- content


def read_documents(
    file: CorpusFile, advance: Callable[[int], None]
) -> Iterator[tuple[Document, bytes]]:
    """Yield every document of a file in pieces; an empty plain file is one empty piece.

    `advance` is told the bytes that were read from the disk. Raises CorpusError.
    """
    name, lower = file.path, file.path.lower()
    try:
        with Path(name).open("rb") as raw:
            counted = _Counted(raw, advance)
            packed = gzip.GzipFile(fileobj=counted) if lower.endswith(".gz") else counted
            with io.BufferedReader(packed, CHUNK_BYTES) as stream:
                if lower.removesuffix(".gz").endswith(".jsonl"):
                    for text in _records(name, stream):
                        yield Document(name, True), text
                    return
                document = Document(name, False)
                yield document, stream.read(CHUNK_BYTES)
                while chunk := stream.read(CHUNK_BYTES):
                    yield document, chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        why = f"{str(error).rstrip('.')}; expected a whole gzip file"
        raise CorpusError(f"corpus {name}: {why}") from None
    except OSError as error:
        raise CorpusError(
            f"corpus {name}: {error.strerror}; expected a readable text file"
        ) from None


class _Counted(io.RawIOBase):
    """An open file that tells what is read of it."""

    def __init__(self, raw: BinaryIO, advance: Callable[[int], None]) -> None:
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._advance(count)
        return int(count)


def _records(name: str, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the field `text` of every line that is not blank."""
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        where = f"corpus {name}: line {number}"
        if len(line) > MAX_RECORD_BYTES:
            raise CorpusError(f"{where} is longer than {MAX_RECORD_BYTES} bytes; {RECORD}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            wrong = f"not UTF-8 at its byte {error.start}, 0x{line[error.start]:02x}"
            raise CorpusError(f"{where}: {wrong}; {RECORD}") from None
        except json.JSONDecodeError as error:
            wrong = f"{error.msg}, at column {error.colno}"
            raise CorpusError(f"{where}: not JSON: {wrong}; {RECORD}") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, say
            wrong = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise CorpusError(f"{where}: not JSON: {wrong}; {RECORD}") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: not an object; {RECORD}")
        if not isinstance(record.get("text"), str):
            fields = printable(", ".join(record)) or "no field"
            wrong = "its text is no string" if "text" in record else f"has {fields}, but no text"
            raise CorpusError(f"{where}: {wrong}; {RECORD}")
        try:
            yield record["text"].encode()
        except UnicodeEncodeError:
            raise CorpusError(f"{where}: half of a character in its text; {RECORD}") from None


RECORD = 'expected an object a line, such as {"text": "Once upon a time"}'
