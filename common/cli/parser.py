"""argparse with errors of one line."""

from __future__ import annotations

import argparse
import difflib
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
    """argparse with errors of one line: usually the usage message drowns them."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("usage", "%(prog)s [options]")
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
        """As argparse's, but what is left over is refused here: only the subcommand's own parser
        knows the subcommand's options.
        """
        found, rest = super().parse_known_args(*arguments, **options)
        for action in (
            self._actions
        ):  # those with a dot are fields of the specification, which have their own rules
            if (
                action.dest
                and "." not in action.dest
                and getattr(found, action.dest, None) in ("", [""])
            ):
                name = action.option_strings[-1] if action.option_strings else str(action.metavar)
                raise UsageError(f"{name}: empty; expected {action.metavar or 'a value'}")
        if not rest:
            return found, rest
        if not rest[0].startswith("-"):
            raise UsageError(
                f"{rest[0]!r}: belongs to no option; a list takes commas, such as 1,2,4"
            )
        known = [option for action in self._actions for option in action.option_strings]
        raise UsageError(
            f"{rest[0]}: unknown option{closest(rest[0].split('=')[0], known, 'see --help')}"
        )

    def show_only(self, common: Set[str]) -> None:
        """Leave out of --help what `common` does not name; --help-all shows every option."""
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with a suggestion."""
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            guesses = difflib.get_close_matches(str(value), action.choices, 1)
            hint = (
                f"did you mean {guesses[0]}?"
                if guesses
                else f"expected one of {', '.join(action.choices)}"
            )
            raise UsageError(f"unknown subcommand {value!r}; {hint}")
        raise argparse.ArgumentError(
            action, f"{value!r}: unknown{closest(str(value), action.choices)}"
        )
