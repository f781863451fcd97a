"""Wrong input becomes one line: its exception, and the suggestion in it. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


class UsageError(ValueError):
    """Wrong input from the user; its text is one line. Every room's own errors are such."""


def known_word(where: str, word: object, known: Iterable[str]) -> str:
    """Return the word if it is a known one. Raises UsageError, which says `where` it stands."""
    names = list(known)
    if not isinstance(word, str) or word not in names:
        raise UsageError(f"{where} = {word!r}: unknown{closest(str(word), names)}")
    return word


def closest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return `; expected ...` with the closest known word, or all of them if they are few."""
    names: Sequence[str] = list(known)
    guesses = difflib.get_close_matches(word, names, 1)
    if guesses:
        others = [name for name in names if name != guesses[0]]
        rest = f" (or {', '.join(others)})" if 0 < len(others) <= 6 else ""
        return f"; expected {guesses[0]}{rest}"
    if otherwise:
        return f"; {otherwise}"
    return f"; expected one of {', '.join(names)}"


def chosen(text: str, known: Collection[str], option: str) -> list[str]:
    """Return the words of a comma list. Raises UsageError for an unknown one."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UsageError(f"{option}: nothing named; expected some of {', '.join(known)}")
    return [known_word(option, word, known) for word in words]
