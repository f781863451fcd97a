"""Which tests run in this process, and which share a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from common import tokenizer

pytest_plugins = ["tests.watchdog"]

os.environ.pop("COLUMNS", None)  # of the terminal that the tests were started in; tables would be folded to fit it

# Tests send these to children, who would inherit that they are ignored (nohup, a script's job in the background).
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # which no child inherits

settings.register_profile("default", deadline=None)  # examples are slow on a busy machine, not wrong
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_are_not_kept_in_the_users_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tokenizers")
        patch.setattr(tokenizer, "kept_in", lambda: folder)
        yield


OWN_PROCESS = [Path(__file__).parent / framework for framework in ("torch", "tensorflow", "paddle")]
"""Folders whose tests import a framework. Two frameworks in one process crash it, so `test_frameworks.py` starts one pytest
process for each; they are collected here only where the command line names them."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in OWN_PROCESS:
        return None
    named = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    is_named = any(path.is_relative_to(collection_path) for path in named)
    return None if is_named else True


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """A module's tests stay together, but for those over frameworks: each framework's do. The longest begin first."""
    items.sort(key=lambda item: item.path.name != "test_frameworks.py")
    for item in items if config.pluginmanager.has_plugin("xdist") else ():
        parameters = getattr(item, "callspec", None)
        framework = parameters.params.get("framework", "") if parameters else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}:{framework}"))
