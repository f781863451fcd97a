"""Keys and values of earlier positions, so that a new token costs one position and not all.

Differs: written in place into memory that doubles when it is full; the other frameworks' views
copy, so there the old and the new are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class Cache:
    """What the units of one chunk keep of one group of sequences."""

    def __init__(self) -> None:
        self.length = 0
        """Positions so far; whoever runs the chunk adds to it afterwards."""
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, site: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, S, E) of a site with those of all positions before."""
        end = self.length + k.shape[2]
        keys, values = self._held.get(site, (k, v))
        if end > keys.shape[2]:  # to at least twice as many
            keys, values = (functional.pad(y, (0, 0, 0, end)) for y in (keys, values))
        if site in self._held:
            keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        self._held[site] = keys, values
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence i go on from what is held of sequence `rows[i]`."""
        for site, (k, v) in self._held.items():
            if tuple(rows) == tuple(range(len(k))):
                return
            where = torch.tensor(rows, device=k.device)
            self._held[site] = k[where], v[where]
