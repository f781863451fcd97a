"""Logits far apart, for every framework's loss: kernels clip, round or overflow there. Imports no
framework.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.oracle.limits import LIMITS, difference
from common.spec.data import IGNORED
from common.spec.parameters import TensorKey

Array = NDArray[np.floating]
KEY = TensorKey(0, "forward", 0, 0, "head", "loss")

_RANDOM = np.random.default_rng(0)
EXTREME_LOGITS: dict[str, Array] = {
    "a hundred above the target": np.array([0.0, 100.0, 1.0, 1.0]),
    "at the clip": np.array([0.0, 64.0, 0.0, 0.0]),
    "spread over 700": np.linspace(0, 700, 16),
    "ten thousand": _RANDOM.choice([-1e4, 1e4], 16) + _RANDOM.standard_normal(16),
    "target far above": np.array([500.0, 0.0, -300.0, 2.0]),
    "all equal": np.full(8, 3.7),
    "all equal and large": np.full(8, -1e4),
    "denormal": np.linspace(0, 1e-39, 8),
}
"""One row each, whose target is the first."""


def check_loss(
    loss: Callable[[Array, NDArray[np.int64]], tuple[float, Array]], name: str, dtype: str
) -> None:
    """Holds `loss`, (B, S, V) and (B, S) -> (sum over 3 tokens, gradient), to the limits of parity."""  # noqa: E501
    row = EXTREME_LOGITS[name].astype(dtype)
    logits = np.stack([row, row[::-1], np.zeros_like(row), row])[None]  # (1, 4, V)
    targets = np.array([[0, 1, 2, IGNORED]])
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    one_hot = np.eye(row.size)[np.maximum(targets, 0)]
    counts = (targets != IGNORED)[..., None]
    expected = (
        (np.log(np.exp(shifted).sum(-1)) - (shifted * one_hot).sum(-1)) * counts[..., 0]
    ).sum() / 3
    gradient = (probabilities - one_hot) * counts / 3
    found, of_logits = loss(logits, targets)
    for check, observed, right in (("loss", found, expected), ("gradient", of_logits, gradient)):
        one = difference(KEY, check, np.asarray(observed), np.asarray(right), LIMITS[check][dtype])  # type: ignore[arg-type, index]
        assert one.relative <= one.limit, one
