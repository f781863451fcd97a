"""The watchdog: a hang is ended, in the test's process and in one that it has started; what is
merely long is not.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import subprocess, sys, time

CHILD = "import faulthandler, signal; faulthandler.enable(); signal.pause()"

def test_waits_for_a_child():
    subprocess.run([sys.executable, "-c", CHILD, "a mark"])

def test_looks_again_and_again_for_what_never_comes():
    while True:
        time.sleep(0.1)

def test_computes():
    while time.process_time() < 3.5:
        pass

def test_lets_a_child_compute():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 3.5: pass"], check=True)
"""  # noqa: E501


def test_a_hang_is_told_from_work(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-p", "tests.watchdog", "-o", "hang_seconds=3", "-rA", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_it.py")]
    runs = [
        subprocess.Popen(
            [*command, *workers],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for workers in ([], ["--numprocesses", "1", "-k", "waits or looks"])
    ]
    work = [("PASSED", "test_computes"), ("PASSED", "test_lets_a_child_compute")]
    hangs = [
        ("FAILED", "test_waits_for_a_child"),
        ("FAILED", "test_looks_again_and_again_for_what_never_comes"),
    ]
    for run, expected in zip(runs, (work + hangs, hangs), strict=True):
        said, _ = run.communicate()
        found = re.findall("^(PASSED|FAILED) .*::(test_[a-z_]*)", said, re.MULTILINE)
        assert found == expected, said
        assert said.count("the test hangs: nothing was computed for 3 s") >= 2
        # The test's own, and that of its child.
        stacks = ("in test_waits_for_a_child", 'File "<string>", line 1 in <module>')
        assert all(stack in said for stack in stacks), said
