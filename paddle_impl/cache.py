"""Keys and values of earlier positions, so that a new token costs one position and not all."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor


class Cache:
    """What the units of one chunk keep of one group of sequences."""

    def __init__(self) -> None:
        self.length = 0
        """Positions so far; whoever runs the chunk adds to it afterwards."""
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, site: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, S, E) of a site with those of all positions before."""
        if site in self._held:
            k, v = (paddle.concat(both, 2) for both in zip(self._held[site], (k, v), strict=True))
        self._held[site] = k, v
        return k, v

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence i go on from what is held of sequence `rows[i]`."""
        for site, (k, v) in self._held.items():
            if tuple(rows) == tuple(range(len(k))):
                return
            where = paddle.to_tensor(rows, "int64")
            self._held[site] = k.index_select(where), v.index_select(where)
