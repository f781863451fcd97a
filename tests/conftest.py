"""Which tests share a worker (pytest-xdist, `--dist loadgroup`): those that share child processes."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.pop("COLUMNS", None)  # of the terminal that the tests were started in; tables would be folded to fit it

settings.register_profile("default", deadline=None)  # examples are slow on a busy machine, not wrong
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module's tests stay together, but for those over frameworks: each framework's do."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        framework = parameters.params.get("framework", "") if parameters else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}:{framework}"))
