"""argparse with errors of one line: usually the usage message drowns them."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence, Set
from typing import Any, NoReturn

from common.io.usage import UsageError, closest

RENAMED = {"--snapshot": "--checkpoint", "--peers": "--baselines"}
"""Options by their former names, which still work."""


def with_present_names(argv: Sequence[str]) -> list[str]:
    """Return `argv` with former options by their present names, and say so on stderr."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name in RENAMED:
            print(f"{name} is called {RENAMED[name]} now", file=sys.stderr)
        words.append(RENAMED.get(name, name) + equals + value)
    return words


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, suggests the nearest name, and takes an option once."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("usage", "%(prog)s [options]")
        super().__init__(allow_abbrev=False, **options)
        # No option begins with a digit: `-5GB` is a wrong value, and not an option without one.
        self._negative_number_matcher = re.compile("-[0-9.]")
        self._given: set[str] = set()
        self.refused: dict[str, str] = {}
        """Options that other subcommands have, with why this one does not."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over: only this parser knows the subcommand's options."""
        self._given.clear()
        found, rest = super().parse_known_args(*arguments, **options)
        if not rest:
            return found, rest
        if not rest[0].startswith("-"):
            what = "belongs to no option; a list takes commas, such as 1,2,4"
            raise UsageError(f"{rest[0]!r}: {what}")
        name = rest[0].split("=")[0]
        if name in self.refused:
            raise UsageError(f"{name}: {self.refused[name]}")
        known = [option for action in self._actions for option in action.option_strings]
        hint = closest(name, known, "see --help")
        raise UsageError(f"{rest[0]}: unknown option{hint}")

    def show_only(self, common: Set[str]) -> None:
        """Leave out of --help what `common` does not name; --help-all shows every option."""
        # argparse prints what is not suppressed; so --help-all gives the texts back first.
        rare = [action for action in self._actions if not common & set(action.option_strings)]
        texts = [(action, action.help) for action in rare if action.help is not argparse.SUPPRESS]

        class HelpAll(argparse.Action):
            def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
                for action, text in texts:
                    action.help = text
                parser.print_help()
                parser.exit()

        for action, _ in texts:
            action.help = argparse.SUPPRESS
        self.add_argument(
            "--help-all", nargs=0, action=HelpAll, help=f"show {len(texts)} more options and exit"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def _get_values(self, action: argparse.Action, strings: list[str]) -> Any:
        """As argparse's, once for each option, and never an empty text."""
        name = "/".join(action.option_strings) or str(action.metavar)
        if action.option_strings and action.dest in self._given:
            how = ", with commas between values" if str(action.metavar).endswith(",..") else ""
            raise UsageError(f"{name}: given twice; expected once{how}")
        if not isinstance(action, argparse._AppendAction):
            self._given.add(action.dest)
        # The fields of the specification, whose names have a dot, say themselves what is expected.
        is_text = action.type is None and action.choices is None and "." not in action.dest
        if strings == [""] and is_text:
            raise UsageError(f"{name}: empty; expected {action.metavar or 'a value'}")
        return super()._get_values(action, strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with a suggestion."""
        if action.choices is None or value in action.choices:
            return
        if not isinstance(action, argparse._SubParsersAction):
            hint = closest(str(value), action.choices)
            raise argparse.ArgumentError(action, f"{value!r}: unknown{hint}")
        guesses = difflib.get_close_matches(str(value), action.choices, 1)
        names = ", ".join(action.choices)
        hint = f"did you mean {guesses[0]}?" if guesses else f"expected one of {names}"
        raise UsageError(f"unknown subcommand {value!r}; {hint}")
