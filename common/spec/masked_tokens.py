"""Masked-token training, as BERT's (Devlin et al. 2019, section 3.1): what it sees and predicts.

Of a sequence 15 % of the tokens are chosen, at least one. A chosen token becomes the mask token (80
%), any token of the vocabulary (10 %), or stays what it is (10 %); it alone is a target. What is
chosen is a function of a key and the sample, never of the mini-batch's size or its cut.

    text       t h e   c l a s s            targets of all but the second: IGNORED
    inputs     t # e   c l a s s
    targets    . h .   . . . . .
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHOSEN = 0.15
MASKED, RANDOM = 0.8, 0.1
"""Of the chosen; the rest is kept, so that what is kept tells nothing."""


def mask_tokens(
    tokens: NDArray[np.int64], mask_token: int, vocab_size: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return what the encoder sees of one sequence (S,), and which places are targets (S,).

    15 % of 12 tokens are 1.8: once in five times 1, else 2.
    """
    size = len(tokens)
    count = max(1, int(CHOSEN * size + random.random()))
    chosen = np.argsort(random.random(size), kind="stable")[:count]  # (count,)
    fate, others = random.random(count), (random.random(count) * vocab_size).astype(np.int64)
    replaced = np.where(fate < MASKED + RANDOM, others, tokens[chosen])  # (count,)
    inputs, is_target = tokens.copy(), np.zeros(size, bool)
    inputs[chosen] = np.where(fate < MASKED, mask_token, replaced)
    is_target[chosen] = True
    return inputs, is_target
