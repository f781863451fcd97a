"""Every event and every `record_stream` of `torch_impl` is needed: without it, the fake GPUs give
other bits.

Each mutant is a copy of `torch_impl` with one replacement, on which `test_bits.py` must fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_impl

SOURCE = Path(torch_impl.__file__).parent
ROOT = Path(__file__).parents[3]
ORDERS = re.compile(r"\b(record_stream|record_event|wait_event|wait_stream|synchronize|record)\(")
"""Calls that order what a GPU does, or its host."""

MUTANTS = {
    # file, line, what stands there instead, and the cases of `test_bits.py` that catch it
    "a copy does not wait for the sender": (
        "stage.py",
        "leaving.wait_stream(here)",
        "pass",
        "1f1b",
    ),
    "the sender's memory is free before the copy": (
        "stage.py",
        "tensor.record_stream(leaving)",
        "pass",
        "1f1b",
    ),
    "the receiver does not wait for the copy": (
        "stage.py",
        "return moved, arriving.record_event()",
        "return moved, torch.cuda.Event()",
        "1f1b",
    ),
    "the receiver does not wait": (
        "stage.py",
        "torch.cuda.current_stream().wait_event(arrived)",
        "pass",
        "1f1b",
    ),
    "what was received is free before it is used": (
        "stage.py",
        "tensor.record_stream(torch.cuda.current_stream())  # its memory came from another stream",
        "pass",
        "vee or gpipe",
    ),
    "stages that share a GPU do not wait": (
        "stage.py",
        "return tensor, here.record_event()",
        "return tensor, torch.cuda.Event()",
        "shared",
    ),
    "work ends before the GPU": (
        "engine.py",
        "torch.cuda.current_stream().synchronize()",
        "pass",
        "tied",
    ),
    "times are read before they are there": (
        "clock.py",
        "self._last.synchronize()",
        "pass",
        "1f1b",
    ),
    "marks are not recorded": (
        "clock.py",
        "self._last.record(torch.cuda.current_stream())",
        "pass",
        "1f1b",
    ),
    "the first stream does not wait for the second": (
        "streams.py",
        "main.wait_stream(side)",
        "pass",
        "late",
    ),
    "the second stream does not wait for the first": (
        "streams.py",
        "side.wait_stream(main)",
        "pass",
        "late",
    ),
    "what follows a pass does not wait for the second stream": (
        "streams.py",
        "self._main.wait_stream(self._side)",
        "pass",
        "late",
    ),
}

HARMLESS = {"torch.cuda.current_stream().synchronize()", "torch.cuda.synchronize()"}
"""Of the clock (the engine's line reads the same): without it only its zero would be wrong, by as
long as the stream was busy. Of `roofline.py`: without it only the times of kernels would be wrong.
"""


def test_the_list_names_every_call_that_orders_anything() -> None:
    found = {
        line.strip()
        for path in SOURCE.glob("*.py")
        for line in path.read_text().splitlines()
        if ORDERS.search(line)
    }
    assert found == {line for _, line, *_ in MUTANTS.values()} | HARMLESS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, tmp_path: Path) -> None:
    file, line, instead, cases = MUTANTS[name]
    shutil.copytree(SOURCE, tmp_path / "torch_impl")
    text = (SOURCE / file).read_text()
    assert text.count(line) == 1, f"{file} has {line} {text.count(line)} times; expected once"
    (tmp_path / "torch_impl" / file).write_text(text.replace(line, instead))
    early = ("-p", "torch_impl")  # before pytest puts the root with the real one ahead
    bits = str(Path(__file__).with_name("test_bits.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *early, bits, "-k", cases]
    for late in (1, 10):  # how late is late enough depends on what else the machine does
        environment = os.environ | {
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "FAKE_LATE_US": str(200 * late),
            "FAKE_PAUSE_MS": str(30 * late),
        }
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 1:
            return
    pytest.fail(done.stdout[-3000:])
