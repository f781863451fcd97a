"""Small numeric helpers shared by the specification and the oracle."""

from __future__ import annotations

import math

import numpy as np


def round_to_float32(value: float) -> float:
    """Return the nearest float32 to `value`, as a Python float.

    Frameworks keep some hyperparameters in C++ `float` (Paddle's weight decay and LayerNorm
    epsilon) or in float32 variables (Keras' learning rate). A value that is exact in float32 is the
    same number everywhere.
    """
    return float(np.float32(value))


def finite_float32(value: float) -> float:
    """Round as `round_to_float32`. Raises ValueError for a number beyond float32's range."""
    with np.errstate(over="ignore"):
        rounded = round_to_float32(value)
    if not math.isfinite(rounded):
        raise ValueError(
            f"{value}; expected at most {np.finfo(np.float32).max:.4g}, as float32 has it"
        )
    return rounded
