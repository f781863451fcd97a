"""Which tests run in this process, and which share a worker."""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

# Before NumPy is there. OpenBLAS' threads wait busily, and beside the tests of the other workers
# they wait for one another most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from common.harness import probes
from common.spec import kept

pytest_plugins = ["tests.watchdog"]
pytest.register_assert_rewrite("tests.engines", "tests.every_framework")

# That of the terminal that the tests were started in; tables would be folded to fit it.
os.environ.pop("COLUMNS", None)

# Tests send these to workers, who would inherit that they are ignored (nohup, a script's job in
# the background).
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # which no worker inherits

# An example that is slow on a busy machine is not wrong.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_kept_in_the_users_home(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kept")
        patch.setattr(kept, "kept_in", lambda kind: folder / kind)
        yield


@pytest.fixture(scope="session", autouse=True)
def _the_oracle_runs_once_for_all_workers(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those of pytest-xdist share a folder: there is every run that one of them has needed."""
    if not hasattr(pytestconfig, "workerinput"):
        return
    folder, run = tmp_path_factory.getbasetemp().parent, probes._expected

    @functools.cache
    def once(*arguments: Any) -> probes.Expected:
        name = hashlib.sha256(repr(arguments).encode()).hexdigest()
        with (folder / f"oracle-{name}").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not file.seek(0, os.SEEK_END):
                file.write(pickle.dumps(run(*arguments)))
            file.seek(0)
            return cast(probes.Expected, pickle.load(file))

    probes._expected = once


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_is_no_garbage() -> None:
    """A collection that looks at all of TensorFlow, and at what other modules left, takes 0.4 s;
    there are many.
    """
    gc.collect()
    gc.freeze()


OWN_PROCESS = [Path(__file__).parent / framework for framework in ("torch", "tensorflow", "paddle")]
"""Folders whose tests import a framework. Two frameworks in one process crash it, so
`test_frameworks.py` starts one pytest process for each; they are collected here only where the
command line names them.
"""

LONGEST_FIRST = ("tensorflow", "paddle", "torch")
LONG_TOO = ("test_types.py", "test_hosts.py", "test_faults.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in OWN_PROCESS:
        return None
    named = [
        Path(config.invocation_params.dir, argument.split("::")[0]).resolve()
        for argument in config.args
    ]
    is_named = any(path.is_relative_to(collection_path) for path in named)
    return None if is_named else True


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """A module's tests stay together, but for those over frameworks: each framework's do. The
    longest begin first.
    """

    def framework(item: pytest.Item) -> str:
        parameters = getattr(item, "callspec", None)
        return str(parameters.params.get("framework", "")) if parameters else ""

    def home(item: pytest.Item) -> str:
        """Tests of parity share the runs of their framework."""
        is_parity = item.path.parent.name == "parity" and framework(item)
        return "parity" if is_parity else item.path.name

    def place(item: pytest.Item) -> int:
        if home(item) in ("test_frameworks.py", "parity"):
            return LONGEST_FIRST.index(framework(item))
        return len(LONGEST_FIRST) + (item.path.name not in LONG_TOO)

    items.sort(key=place)
    for item in items if config.pluginmanager.has_plugin("xdist") else ():
        item.add_marker(pytest.mark.xdist_group(f"{home(item)}:{framework(item)}"))
