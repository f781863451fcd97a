"""Checkpoints of weights, compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common import checkpoint


def same_weights(a: Path, b: Path) -> None:
    """Two checkpoints hold the same model, to the bit."""
    one, other = checkpoint.load(a), checkpoint.load(b)
    assert one.manifest.model == other.manifest.model
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name], err_msg=name)
