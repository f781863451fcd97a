"""The store that torchrun keeps for its processes, and longer than they live.

Differs: no other launcher has one for us; there rank 0 keeps it (`common.runtime.text_store`).
"""

from __future__ import annotations

import datetime
from typing import Any

from torch import distributed
from torch.distributed import distributed_c10d as c10d

from common.runtime.launchers import Launched


class TorchrunStore:
    """A connection to it (`common.runtime.meeting.Store`)."""

    def __init__(self, launched: Launched, seconds: float) -> None:
        host, _, port = launched.master.rpartition(":")
        self._store: Any = distributed.TCPStore(  # type: ignore[attr-defined]
            host, int(port), timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False
        )

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def of_run(self, run: str) -> Any:
        """Return what torch.distributed takes for a store: another connection, since one that waits
        holds up others' words, with keys that no run before a restart has used.
        """
        return c10d.PrefixStore(run, self._store.clone())
