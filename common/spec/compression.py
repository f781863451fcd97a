"""What replicas send each other instead of whole gradients: names, shapes and bytes.

    name          sent of a tensor of n values, (n1, n2)       by       remembers     source
    none          its gradient                                 sum
    fp16, bf16    2 n bytes, and the sum as such again         sum
    powersgd:R    P (n1, R), then Q (n2, R)                    sum      the rest, Q   Vogels et al. 2019
    topk:F        the F n largest, each value with its index   gather   the rest      Stich et al. 2018
    sign          n bits and one scale                         gather                 Bernstein et al. 2018
    ef-sign       the same                                     gather   the rest      Karimireddy et al. 2019

sum: every rank adds up one slice for all, so that each sends 2 (d - 1) / d of it. gather: each gets
what every other one sends and adds it up in the order of the ranks; so d - 1 times the whole. What a
replica remembers is added to its next gradient (error feedback).

Every tensor is compressed by itself, in its canonical shape. So numbers depend neither on schedule
nor on partition. `common/oracle/compression.py` is the definition in NumPy.
"""  # noqa: E501

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

WORDS = "none|fp16|bf16|powersgd:R|topk:F|sign|ef-sign"
EXPECTED = "expected none, fp16, bf16, powersgd:R (R of 1 or more), topk:F (0 < F <= 1), sign or "
EXPECTED += "ef-sign"

INDEPENDENT = 1e-3
"""PowerSGD: a column of P of which the others leave no more than this share is dropped. Rounding is
what it would be made of; the error memory keeps what it would have sent."""
WORD_BITS = 32
"""Signs and indices travel in words of so many bits."""

Kind = Literal["none", "fp16", "bf16", "powersgd", "topk", "sign", "ef-sign"]


class Compression(NamedTuple):
    """What `--compress` says."""

    kind: Kind
    rank: int = 0
    fraction: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Raise ValueError for anything but one of `WORDS`."""
        if text in ("none", "fp16", "bf16", "sign", "ef-sign"):
            return cls(text)  # type: ignore[arg-type]
        if found := re.fullmatch(r"powersgd:([1-9][0-9]{0,5})", text):
            return cls("powersgd", rank=int(found[1]))
        found = re.fullmatch(r"topk:([0-9]*\.?[0-9]+(?:e-?[0-9]{1,2})?)", text)
        if found and 0 < (fraction := float(found[1])) <= 1:
            return cls("topk", fraction=fraction)
        raise ValueError(f"unknown; {EXPECTED}")

    @property
    def remembers(self) -> bool:
        """Return whether a replica keeps what it has not sent, for later steps."""
        return self.kind in ("powersgd", "topk", "ef-sign")

    @property
    def is_gathered(self) -> bool:
        return self.kind in ("topk", "sign", "ef-sign")

    def factor_rank(self, shape: Sequence[int]) -> int:
        """Return the rank of a tensor's factors; 0 where it is sent whole: a vector, or a matrix
        whose factors are no smaller.
        """
        # R (n1 + n2) numbers in place of n1 n2: for 64 x 64 and R = 4 an eighth, for R = 32 all.
        pays = len(shape) == 2 and self.rank * sum(shape) < math.prod(shape)
        return self.rank if self.kind == "powersgd" and pays else 0

    def kept(self, size: int) -> int:
        """Return how many of a tensor's values are sent."""
        return max(1, round(self.fraction * size))

    def words_and_values(self, size: int) -> tuple[int, int]:
        """Return how many of each are sent of a tensor that is gathered: indices and values, or
        signs, 32 to a word, and their scale.
        """
        return (self.kept(size),) * 2 if self.kind == "topk" else (-(-size // WORD_BITS), 1)

    def message_bytes(self, shape: Sequence[int], element_bytes: int) -> int:
        """Return the bytes of what stands for one tensor, whose values have `element_bytes`."""
        size = math.prod(shape)
        if self.kind in ("fp16", "bf16"):
            return 2 * size
        if rank := self.factor_rank(shape):
            return rank * sum(shape) * element_bytes
        if self.is_gathered:
            words, values = self.words_and_values(size)
            return words * WORD_BITS // 8 + values * element_bytes
        return size * element_bytes

    def pair_bytes(self, message_bytes: int, replicas: int) -> int:
        """Return what each replica sends to each other one, given the bytes of all its tensors."""
        # Gathered: the whole message goes to each other replica. Summed: 2 (d - 1) / d of it in
        # all, spread over d - 1 others, is 2 / d for each.
        return message_bytes if self.is_gathered else math.ceil(2 * message_bytes / replicas)
