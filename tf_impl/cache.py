"""Keys and values of earlier positions, so that a new token costs one position and not all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

Held = Mapping[str, tuple[tf.Tensor, tf.Tensor]]
"""By site, keys and values (B, K, S, E)."""


class Cache:
    """What the units of one chunk keep of one group of sequences.

    Differs: a traced function takes what was held and returns what is held; it is in one of these
    while it is traced, and in another one between two calls.
    """

    def __init__(self, length: Any = 0, held: Held | None = None) -> None:
        self.length = length
        """Positions so far, a number or () int32; whoever runs the chunk adds to it afterwards."""
        self.held = dict(held or {})

    def extend(self, site: str, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the keys and values (B, K, S, E) of a site with those of all positions before."""
        if site in self.held:
            k, v = (tf.concat(both, 2) for both in zip(self.held[site], (k, v), strict=True))
        self.held[site] = k, v
        return k, v

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence i go on from what is held of sequence `rows[i]`."""
        for site, (k, v) in self.held.items():
            if tuple(rows) == tuple(range(len(k))):
                return
            self.held[site] = tf.gather(k, rows), tf.gather(v, rows)
