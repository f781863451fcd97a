"""Memory that a step has freed is there for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading
import numpy as np
from common.runtime.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()


def hold(mib):
    return [np.ones(mib * 2**17) for _ in range(192 // mib)]


def step():
    held = [hold(mib) for mib in (2, 48, 96)]  # a tensor may be larger than a thread's heap, 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del held
    held = [hold(mib) for mib in (2, 48, 96)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


thread = threading.Thread(target=step)  # a stage computes in a thread, whose heaps are its own
thread.start()
thread.join()
"""


def page_faults(how: str, **variables: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", STEPS, how]
    return int(subprocess.check_output(command, env=plain | variables, text=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_second_step_touches_no_new_page() -> None:
    assert page_faults("given back") > 10_000
    assert page_faults("kept") < 1_000
    assert page_faults("kept", MALLOC_TOP_PAD_="0") > 10_000  # the user's own setting counts
