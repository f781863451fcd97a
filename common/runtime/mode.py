"""What a pass over a mini-batch is for."""

from __future__ import annotations

import enum


class Mode(enum.Enum):
    """What a pass over a mini-batch is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    """Only forward, without dropout."""
    RECORD = "record"
    """Only forward, with the dropout of a training step, keeping every unit's output."""
    PREDICT = "predict"
    """Only forward, without dropout or loss, keeping the head's output."""

    @property
    def has_dropout(self) -> bool:
        """Whether the dropout masks are applied."""
        return self in (Mode.TRAIN, Mode.RECORD)

    def keeps(self, unit: str) -> bool:
        """Return whether the output of this unit is kept."""
        return self is Mode.RECORD or (self is Mode.PREDICT and unit == "head")
