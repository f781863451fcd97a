"""Small numeric helpers shared by the specification and the oracle."""

from __future__ import annotations

import numpy as np


def round_to_float32(value: float) -> float:
    """The nearest float32 to `value`, as a Python float.

    Frameworks keep some hyperparameters in C++ `float` (Paddle's weight decay and LayerNorm epsilon) or in float32
    variables (Keras' learning rate). A value that is exact in float32 is the same number everywhere.
    """
    return float(np.float32(value))
