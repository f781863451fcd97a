"""Which Python runs a framework: --python FRAMEWORK=PATH, a table [python] in TOML, and
FRAMEWORK@PATH wherever a framework is named, so that two versions of one stand side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common.cli.settings import Setting, Settings
from common.harness.interpreters import EXPECTED, InterpreterError, find_interpreter
from common.harness.launch import IMPLEMENTATIONS, why_missing
from common.io.usage import UsageError, closest
from common.report.names import framework_name
from common.spec.run import FRAMEWORKS, Framework, RunConfig

SECTION = "python"
OPTION = "--python"
FORM = "expected FRAMEWORK=PATH, such as torch=/opt/conda/envs/torch/bin/python"


def add_python(parser: Any) -> None:
    """Add the option to a parser or a group of one."""
    parser.add_argument(
        OPTION,
        metavar="FRAMEWORK=PATH",
        action="append",
        default=[],
        help="the Python that has this framework, or the folder of its environment; once for each "
        "framework (default: .venv-FRAMEWORK beside the project, or else this Python)",
    )


def named_pythons(arguments: argparse.Namespace) -> Settings:
    """Return what --python names. Raises UsageError."""
    found = Settings()
    for text in arguments.python:
        framework, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"{OPTION} {text}: {FORM}")
        if (SECTION, framework) in found:
            raise UsageError(
                f"{OPTION}: {framework} has two; --frameworks {framework}@PATH,.. makes a row of "
                "each"
            )
        found[SECTION, framework] = Setting(path, f"{OPTION} {text}")
    return found


def checked_pythons(settings: Settings) -> dict[str, str]:
    """Return the named interpreters by framework. Raises UsageError for one that cannot run it."""
    return {
        framework: _checked(framework, setting)
        for (section, framework), setting in settings.items()
        if section == SECTION
    }


def with_python(settings: Settings) -> Settings:
    """Return one run's settings with its interpreter, after all were checked. Raises UsageError."""
    # torch@PATH names an interpreter for one row, --python one for all rows of a framework.
    pythons = checked_pythons(settings)
    found = Settings({key: each for key, each in settings.items() if key[0] != SECTION})
    given = settings["run", "framework"]
    name, at, path = str(given.value).partition("@")
    if at and name in FRAMEWORKS:
        pythons[name] = _checked(name, Setting(path, f"{given.where} {given.value}"))
    if name in pythons:
        found["run", "framework"] = Setting(name, given.where, given.is_given)
        found["run", "python"] = Setting(pythons[name], OPTION)
    return found


def chosen_frameworks(
    text: str, arguments: argparse.Namespace, option: str
) -> list[tuple[Framework, str | None]]:
    """Return the frameworks of a comma list, such as torch,torch@PATH, with the interpreters that
    are named. Raises UsageError.
    """
    pythons = checked_pythons(named_pythons(arguments))
    found: list[tuple[Framework, str | None]] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, at, path = word.partition("@")
        framework = next((known for known in FRAMEWORKS if known == name), None)
        if framework is None:
            raise UsageError(f"{option} = {name!r}: unknown{closest(name, FRAMEWORKS)}")
        python = pythons.get(name)
        if at:
            python = _checked(name, Setting(path, f"{option} {word}"))
        found.append((framework, python))
    if not found:
        raise UsageError(f"{option}: nothing named; expected some of {', '.join(FRAMEWORKS)}")
    return list(dict.fromkeys(found))


def check_names(points: Sequence[RunConfig]) -> None:
    """Refuse two interpreters that would have one name in tables. Raises UsageError."""
    known: dict[str, str | None] = {}
    for point in points:
        name = framework_name(point)
        if known.setdefault(name, point.python) != point.python:
            raise UsageError(
                f"{known[name]} and {point.python} would both be called {name} in the tables; "
                "expected environments in folders of different names"
            )


def _checked(framework: str, setting: Setting) -> str:
    """Return the path of the interpreter, if it can run the framework. Raises UsageError."""
    where, path = setting.where, setting.value
    if framework not in FRAMEWORKS:
        raise UsageError(f"{where}: {framework!r} is unknown{closest(framework, FRAMEWORKS)}")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{where}: expected {EXPECTED}")
    try:
        python = find_interpreter(path)
    except InterpreterError as error:
        raise UsageError(f"{where}: {error}") from None
    if missing := why_missing(IMPLEMENTATIONS[framework], python=python):
        raise UsageError(f"{where}: {missing}")
    return python
