"""The command line as users call it, with other implementations, and a training that is small."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import pytest

from common.cli import main
from common.cli.parser import Parser
from common.harness.launch import Implementation
from common.spec.run import FRAMEWORKS

MORTAL = {name: Implementation("tests.fakes.mortal", "numpy", "") for name in FRAMEWORKS}
"""The oracle in the place of every framework; it dies when a test says so."""
SMALL: Mapping[str, object] = {
    **{"--d-model": 8, "--d-ff": 8, "--context-length": 8},
    **{"--batch-size": 4, "--micro-batches": 2, "--dtype": "float64"},
}


def call(
    argv: Iterable[object], implementations: Mapping[str, Implementation], *modules: ModuleType
) -> int:
    """Run one of the modules' subcommands with these implementations; return its exit status."""
    parser = Parser(prog="triptych")
    subcommands = parser.add_subparsers(parser_class=Parser, prog="triptych")
    for module in modules:
        module.register(subcommands, implementations)
    return main.run(parser, list(map(str, argv)))


def with_defaults(defaults: Mapping[str, object], argv: Iterable[object]) -> list[str]:
    """Return `argv` with the options that it leaves out: the program takes each once."""
    given = list(map(str, argv))
    left_out = [pair for pair in defaults.items() if pair[0] not in given]
    return [str(word) for pair in left_out for word in pair] + given


def words(line: str, **values: Any) -> list[str]:
    """Return the words of a command line; `{name}` stands for a value, spaces and all."""
    return [word.format(**values) for word in shlex.split(line)]


def assert_refused(
    status: int, message: str, capture: pytest.CaptureFixture[str], silent: bool = False
) -> str:
    """Assert that a command line was refused: status 2, and one line, which holds `message`.

    `silent`: and nothing on standard output since it was last read.
    """
    output, error = capture.readouterr()
    assert status == 2 and message in error and error.count("\n") == 1, (message, error)
    assert not (silent and output)
    return error
