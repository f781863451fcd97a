"""What checkpoints hold, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoint


def tensors_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's weights and moments."""
    saved = checkpoint.load(folder)
    return {**saved.weights, **saved.optimizer_state}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether both have the same names and hold the same bits."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def same_weights(a: Path, b: Path) -> None:
    """Two checkpoints hold the same model, to the bit."""
    one, other = checkpoint.load(a), checkpoint.load(b)
    assert one.manifest.model == other.manifest.model
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name], err_msg=name)
