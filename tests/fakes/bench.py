"""`python -m tests.fakes.bench ARGS`: bench_all.py with the stand-in for every framework.

The variable FAKE_MISSING names a framework that is to look as if it were not installed.
"""

from __future__ import annotations

import os
import sys

from common.cli.main import bench_main
from common.harness import launch
from common.harness.launch import Implementation
from common.spec.run import FRAMEWORKS

MISSING = os.environ.get("FAKE_MISSING")
IMPLEMENTATIONS = {
    name: Implementation(
        "tests.fakes.impl", "no_such_package" if name == MISSING else "numpy", f"pip install {name}"
    )
    for name in FRAMEWORKS
}

if __name__ == "__main__":
    launch.TERMINATE_SECONDS = 0.5
    sys.exit(bench_main(implementations=IMPLEMENTATIONS))
