"""What replicas send instead of gradients, over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.compression import check


def test_compressed_sums_are_the_oracles_and_as_few_bytes_as_promised(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.torch.compressing", str(tmp_path)], check=True)
    check("torch", tmp_path)
