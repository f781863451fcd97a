"""Wrong input is one line: the error, the parser that raises it, and the suggestion in it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class UsageError(ValueError):
    """Wrong input from the user; its text is one line."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: usually the usage message drowns them."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("usage", "%(prog)s [options]")
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
        """As argparse's, but what is left over is refused here: only the verb's own parser knows the verb's options."""
        found, rest = super().parse_known_args(*arguments, **options)
        for action in self._actions:  # those with a dot are fields of the specification, which have their own rules
            if action.dest and "." not in action.dest and getattr(found, action.dest, None) in ("", [""]):
                name = action.option_strings[-1] if action.option_strings else str(action.metavar)
                raise UsageError(f"{name}: empty; expected {action.metavar or 'a value'}")
        if not rest:
            return found, rest
        if not rest[0].startswith("-"):
            raise UsageError(f"{rest[0]!r}: belongs to no option; a list takes commas, such as 1,2,4")
        known = [option for action in self._actions for option in action.option_strings]
        raise UsageError(f"{rest[0]}: unknown option{closest(rest[0].split('=')[0], known, 'see --help')}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with a suggestion."""
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            guesses = difflib.get_close_matches(str(value), action.choices, 1)
            hint = f"did you mean {guesses[0]}?" if guesses else f"expected one of {', '.join(action.choices)}"
            raise UsageError(f"unknown subcommand {value!r}; {hint}")
        raise argparse.ArgumentError(action, f"{value!r}: unknown{closest(str(value), action.choices)}")


def closest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`; right would be ...`: the closest known word, or all of them if they are few."""
    names: Sequence[str] = list(known)
    guesses = difflib.get_close_matches(word, names, 1)
    if guesses:
        others = [name for name in names if name != guesses[0]]
        rest = f" (or {', '.join(others)})" if 0 < len(others) <= 6 else ""
        return f"; right would be {guesses[0]}{rest}"
    if otherwise:
        return f"; {otherwise}"
    return f"; right would be one of {', '.join(names)}"
