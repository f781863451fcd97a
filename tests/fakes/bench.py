"""`python -m tests.fakes.bench ARGS`: bench_all.py with the stand-in for every framework.

The variable FAKE_MISSING names a framework that is to look as if it were not installed; with
FAKE_REPORT=table the report is its table alone, since pictures take most of the time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.cli.main import bench_main
from common.harness import launch
from common.harness.launch import Implementation
from common.report import tables
from common.report.collect import Collection
from common.spec.run import FRAMEWORKS

MISSING = os.environ.get("FAKE_MISSING")
IMPLEMENTATIONS = {
    name: Implementation(
        "tests.fakes.impl", "no_such_package" if name == MISSING else "numpy", f"pip install {name}"
    )
    for name in FRAMEWORKS
}


def publish(collection: Collection, folder: Path, sweep: bool) -> None:
    (folder / "table.csv").write_text(tables.csv_table(collection.rows))


if __name__ == "__main__":
    if os.environ.get("FAKE_REPORT") == "table":
        instead: Any = SimpleNamespace(publish=publish)
        sys.modules["common.report.publish"] = instead
    launch.TERMINATE_SECONDS = 0.5
    sys.exit(bench_main(implementations=IMPLEMENTATIONS))
