"""Small numeric helpers shared by the specification and the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def in_precision(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Round to the nearest values of `dtype`. NumPy has no bfloat16: float32 holds those."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    # bfloat16 is float32's upper half, and half a unit of its last place is 0x8000. Adding one
    # less, or 0x8000 where the last kept bit is odd, carries for all that lies above half; what is
    # exactly half goes up from an odd value only, to the even one.
    nearest_even = ((bits >> 16) & 1) + 0x7FFF
    return ((bits + nearest_even) & 0xFFFF0000).astype(np.uint32).view(np.float32)
