"""Which tests share a worker (pytest-xdist, `--dist loadgroup`): those that share child processes."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None)  # examples are slow on a busy machine, not wrong
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module's tests stay together, but for those over frameworks: each framework's do."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        framework = parameters.params.get("framework", "") if parameters else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}:{framework}"))
