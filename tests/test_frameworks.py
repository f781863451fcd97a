"""Runs the tests that import a framework, each framework's in one pytest process: `pytest
tests/torch` and so on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.spec.run import FRAMEWORKS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_its_own_tests_pass(framework: str, pytestconfig: pytest.Config) -> None:
    # Sooner than this test's own limit, which would say less about a hang.
    sooner = float(pytestconfig.getini("hang_seconds")) / 2
    options = [
        "-p",
        "no:xdist",
        "-o",
        "addopts=-ra",
        "-o",
        f"hang_seconds={sooner}",
        "--durations=5",
    ]
    command = [sys.executable, "-m", "pytest", "-v", *options, f"tests/{framework}"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # Line by line, so that a failure of any kind shows how far it got.
            print(line, end="", flush=True)
    assert process.returncode == 0
