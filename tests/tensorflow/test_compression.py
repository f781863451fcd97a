"""What replicas send instead of gradients, by collectives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.compression import check


def test_compressed_sums_are_the_oracles_and_as_few_bytes_as_promised(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.tensorflow.compressing", str(tmp_path)], check=True
    )
    check("tensorflow", tmp_path)
