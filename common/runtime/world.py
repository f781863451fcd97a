"""The processes of a run, as each of them knows them; no framework in here."""

from __future__ import annotations

from dataclasses import dataclass

from common.runtime.meeting import Room


@dataclass(frozen=True)
class World:
    """This process' rank, and where every rank listens."""

    rank: int
    endpoints: tuple[str, ...]
    """host:port of every rank."""
    room: Room | None = None
    """Where they have met, if a launcher has started them."""

    @property
    def size(self) -> int:
        return len(self.endpoints)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of every rank."""
        return tuple(endpoint.rsplit(":", 1)[0] for endpoint in self.endpoints)

    @property
    def local_rank(self) -> int:
        """This process' number among those of its host."""
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_size(self) -> int:
        """The processes of this host, which share its CPUs and GPUs."""
        return self.hosts.count(self.hosts[self.rank])
