"""Runs the tests that import a framework, each framework's in one pytest process: `pytest tests/torch` and so on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.spec import FRAMEWORKS

ROOT = Path(__file__).parent.parent
NO_TESTS = 5


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_its_own_tests_pass(framework: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "addopts=-ra", f"tests/{framework}"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    print(done.stdout.splitlines()[-1])
