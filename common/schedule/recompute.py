"""Recomputation: a backward computes its forward again instead of holding what that left (Chen et
al. 2016, "Training deep nets with sublinear memory cost"; Huang et al. 2019, section 2.3).

none          nothing is computed again
full          between F and B a chunk holds its input alone; B computes the chunk's forward again (GPipe's choice)
except-last   the same, but not for the last micro-batch, whose B follows its F at once on the last stage of 1f1b
every-N       a chunk in pieces of N units: it holds every piece's input, and B has one piece's activations at a time
"""  # noqa: E501

from __future__ import annotations

import re

WORDS = "none|full|except-last|every-N"
PATTERN = r"^(none|full|except-last|every-[1-9][0-9]*)$"


def is_known(recompute: str) -> bool:
    return re.fullmatch(PATTERN, recompute) is not None


def recomputes(recompute: str, micro_batch: int, micro_batches: int) -> bool:
    """Return whether this micro-batch's backward, of so many, computes its forward again."""
    return recompute != "none" and not (
        recompute == "except-last" and micro_batch == micro_batches - 1
    )
