"""Two frameworks in one process crash it."""

import sys

import pytest


@pytest.mark.parametrize("other", sorted({"torch", "tensorflow", "paddle"} - {"torch"}))
def test_no_other_framework_is_in_this_process(other: str) -> None:
    assert "torch" in sys.modules
    assert other not in sys.modules
