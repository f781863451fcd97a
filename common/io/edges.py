"""Text at the program's edges: file names, typed numbers, standard output, files people read.

A name on Linux is bytes. Python keeps those that are not UTF-8 as surrogates (PEP 383), which
neither JSON nor a terminal takes. So names travel through JSON as `OsText`, files are written with
`write_file`, and streams (`common.io.streams`) replace what they cannot show.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

_Number = TypeVar("_Number", int, float)
_INT, _FLOAT = TypeAdapter(int), TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile("\0([89a-f][0-9a-f])")


def _escape(text: str) -> str:
    """The bytes behind surrogates as NUL and two digits: no name has a NUL, so this reads back."""

    def byte(match: re.Match[str]) -> str:
        # PEP 383: byte 0xE4 that is no UTF-8 became U+DCE4.
        number = ord(match[0]) - 0xDC00
        if not 0x80 <= number <= 0xFF:
            raise ValueError(
                "half of a character (a lone surrogate); expected text of whole characters"
            )
        return f"\0{number:02x}"

    return _SURROGATE.sub(byte, text)


def _read(text: str) -> str:
    found = _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
    if "\0" in found:
        raise ValueError("a NUL character; expected text without a NUL character")
    return found


OsText = Annotated[
    str,
    BeforeValidator(lambda value: _escape(value) if isinstance(value, str) else value),
    AfterValidator(_read),
    PlainSerializer(_escape, when_used="json"),
]
"""A file's name or a command line as the operating system gives it; JSON holds it, UTF-8 or not."""


def from_command_line(text: str, option: str) -> str:
    """Return what the user typed as UTF-8, whatever the locale. Raises ValueError."""
    if not _SURROGATE.search(text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        place = (
            f"byte {error.start}"
            if isinstance(error, UnicodeDecodeError)
            else "half of a character"
        )
        raise ValueError(f"{option}: not UTF-8 ({place}); expected text in UTF-8") from None


def whole_number(text: object) -> int | None:
    """Parse a whole number as the specification does (`²` is a digit but no number), else None."""
    return _parsed(_INT, text)


def number(text: object) -> float | None:
    """Parse a finite number in the same way."""
    return _parsed(_FLOAT, text)


def _parsed(kind: TypeAdapter[_Number], text: object) -> _Number | None:
    try:
        return kind.validate_python(text)
    except ValidationError:
        return None


def printable(text: str, longest: int = 80) -> str:
    """Make a file's name, or text from a file, safe to show: any length, any characters."""
    text = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for letter in text[: longest + 1]
    )
    return text if len(text) <= longest else text[: longest - 3] + "..."


def write_file(path: Path, text: str) -> None:
    """Write UTF-8 whatever the locale; names that are not UTF-8 are in it as `\\udcXX`."""
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        # A full disk does not say which file it has no room for.
        error.filename = error.filename or str(path)
        raise
