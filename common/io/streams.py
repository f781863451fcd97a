"""Standard streams that survive their reader and can show any character."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_PLAIN = {"·": ".", "─": "-", "—": "-", "…": "..."}
"""What draws a chart, for streams that have ASCII alone."""


class LastingStream:
    """A text stream that survives its reader: a closed pipe, a full disk, a closed terminal.

    At the first failed write `say(error)` is called; everything written later is dropped.
    """

    def __init__(self, stream: TextIO, say: Callable[[OSError], None] = lambda error: None) -> None:
        self._stream, self._say = stream, say
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  what is still buffered has to go somewhere
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self.error = error
            self._say(error)


@contextlib.contextmanager
def lasting_streams(notice: Callable[[OSError], str]) -> Iterator[LastingStream]:
    """Make standard output and error `LastingStream`s within the context, and yield the first.

    Closed ones lead nowhere. `notice(error)` makes the line that standard error gets if standard
    output fails; none if it is empty.
    """
    _open_closed_streams()
    set_up_streams()
    errors = LastingStream(sys.stderr)

    def say(error: OSError) -> None:
        if line := notice(error):
            errors.write(line + "\n")
            errors.flush()

    output = LastingStream(sys.stdout, say)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield output
        finally:
            output.flush()
            errors.flush()


def _open_closed_streams() -> None:
    """The first file opened takes the first free number: it must not be taken for a stream."""
    # `command >&-` starts a program without a standard output, and the next open file would be it.
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets this number: those before it are open
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def set_up_streams() -> None:
    """Let standard streams replace what their encoding lacks, and print names as bytes."""
    codecs.register_error("readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it is closed
            stream.reconfigure(errors="readable")


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _PLAIN.get(letter) or letter.encode(
        "ascii", "backslashreplace"
    ).decode(), error.start + 1
