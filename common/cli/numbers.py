"""Types of options for argparse: numbers with a lower bound; and the option that all runs have."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

from common.io.edges import number, whole_number


def positive(text: str) -> int:
    return at_least(1, text)


def natural(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    """Return a type for argparse: a whole number from `least` on, else ArgumentTypeError."""
    found = whole_number(text)
    if found is None or found < least:
        raise ArgumentTypeError(f"{text!r}; expected a whole number, at least {least}")
    return found


def number_that(fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return a type for argparse: a number that `fits`, else an error with what is `expected`."""

    def read(text: str) -> float:
        found = number(text)
        if found is None or not fits(found):
            raise ArgumentTypeError(f"{text!r}; expected {expected}")
        return found

    return read


def seconds(text: str) -> float:
    """Read a number above 0, or inf. Raises ArgumentTypeError."""
    found = float("inf") if text == "inf" else number(text)
    if found is None or found <= 0:
        raise ArgumentTypeError(f"{text!r}; expected a number of seconds, more than 0")
    return found


def add_timeout(parser: ArgumentParser, what: str = "worker process") -> None:
    """Add --timeout; without it nothing is ended for the time that it takes."""
    text = f"end a {what} that takes longer"
    parser.add_argument("--timeout", metavar="SECONDS", type=seconds, default=math.inf, help=text)
