"""What PyTorch holds for its backward is what the memory model says."""

from __future__ import annotations

from tests.engines import Make, check_held_bytes


def test_every_device_holds_what_was_predicted(make: Make) -> None:
    check_held_bytes(make)
