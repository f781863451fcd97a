"""Which token comes next, one sequence by itself: the likeliest, or one that is drawn.

It is decided here and not in a framework: from logits as NumPy arrays, by float64 arithmetic and a
random number that is a function of (seed, sample, position) alone. So the frameworks give the same
tokens as long as their logits are close enough, which the closest call measures: the smallest
distance that any choice had to the next one, in logits (greedy, and the last of the top k) or in
probability (sampled, and the last of the top p). A tie goes to the lower token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.runtime.job import Generation


class Samples:
    """Continuations of one prompt, each chosen without the others."""

    def __init__(self, wish: Generation, samples: Sequence[int]) -> None:
        self._wish, self._open, self._position = wish, list(samples), 0
        self._texts = {sample: list(wish.prompt) for sample in samples}
        self.closest_call = math.inf

    @property
    def texts(self) -> list[list[int]]:
        """The sequences that go on, prompt included; before the first choice the prompt alone."""
        texts = [self._texts[sample] for sample in self._open]
        return texts if self._position else texts[:1]

    def choose(self, logits: NDArray[np.float64]) -> tuple[int, ...]:
        """Add a token to each of `texts`; return the rows of `logits` (b, V) that go on."""
        wish, open_samples, rows = self._wish, [], []
        for place, sample in enumerate(self._open):
            # The first choice of all samples is from the prompt's one row of logits.
            row = place if self._position else 0
            token, call = pick(logits[row], wish, sample, self._position)
            self._texts[sample].append(token)
            self.closest_call = min(self.closest_call, call)
            if token != wish.eos and self._position + 1 < wish.tokens:
                open_samples.append(sample)
                rows.append(row)
        self._open, self._position = open_samples, self._position + 1
        return tuple(rows)

    def found(self) -> list[list[int]]:
        """Return the new tokens of every sample, the end of sequence included."""
        return [text[len(self._wish.prompt) :] for text in self._texts.values()]


def pick(
    logits: NDArray[np.float64], wish: Generation, sample: int, position: int
) -> tuple[int, float]:
    """Return the next token, and how close another one was."""
    if wish.temperature is None:
        best = int(np.argmax(logits))  # the first of equals
        return best, float(logits[best] - np.delete(logits, best).max())
    scaled = logits / wish.temperature
    kept, call = kept_tokens(scaled, wish)
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)  # (V,)
    # The edges are in the order of the tokens, not of the weights: two frameworks whose near-ties
    # come out the other way round still cut [0, 1) at the same places. With weights 0.5, 0.3, 0.2
    # the edges are 0.5, 0.8, 1.0, and a draw of 0.79 takes token 1, with a call of 0.01.
    edges = np.cumsum(weights) / weights.sum()  # (V,)
    draw = uniform(wish.seed, sample, position)
    token = int(np.searchsorted(edges, draw, side="right"))
    token = min(token, int(np.flatnonzero(kept)[-1]))  # the last edge may be rounded below 1
    below = edges[token - 1] if token else 0.0
    return token, min(call, float(min(draw - below, edges[token] - draw)))


def kept_tokens(scaled: NDArray[np.float64], wish: Generation) -> tuple[NDArray[np.bool_], float]:
    """Return which tokens the top k and then the top p leave, and how close another one was."""
    call, temperature = math.inf, wish.temperature or 1.0
    kept = np.ones(len(scaled), bool)
    # The k-th and the next: closer than the frameworks' logits are, they could change places.
    if wish.top_k is not None and wish.top_k < len(scaled):
        place = len(scaled) - wish.top_k
        following, last = np.partition(scaled, (place - 1, place))[place - 1 : place + 1]
        kept = scaled >= last
        call = float(last - following) * temperature
    if wish.top_p is not None and wish.top_p < 1:
        # The fewest of the likeliest that make up p, as transformers' TopPLogitsWarper has it.
        order = np.flatnonzero(kept)  # (k,)
        order = order[np.argsort(-scaled[order], kind="stable")]
        weights = np.exp(scaled[order] - scaled[order[0]])
        totals = np.cumsum(weights) / weights.sum()  # (k,)
        count = min(int(np.searchsorted(totals, wish.top_p, side="left")) + 1, len(order))
        kept = np.zeros(len(scaled), bool)  # (V,)
        kept[order[:count]] = True
        call = min(call, float(np.abs(totals[:-1] - wish.top_p).min(initial=math.inf)))
        if count < len(order):
            last, following = scaled[order[count - 1]], scaled[order[count]]
            call = min(call, float(last - following) * temperature)
    return kept, call


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing else (Philox: Salmon et al. 2011)."""
    philox = np.random.Philox(
        key=np.array([seed, sample], np.uint64), counter=np.array([0, 0, 0, position], np.uint64)
    )
    return float(np.random.Generator(philox).random())
